"""Hub: what a Hugging Face hub is asked for: commits, listings, files from any byte on.

Of huggingface_hub's own downloads a file that is cut short begins anew, because each has a partial
file of its own that goes with it; and what came over plain HTTP is compared by its size alone.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils.tqdm import disable_progress_bars

from cluster.errors import HubUnreachable, WeightsMissing
from cluster.hub_file import CHECKSUM, HubFile, checksum, partial_of

_TRANSPORT: type[Exception] = HfHubHTTPError.__bases__[0]  # base of the errors of its HTTP library

T = TypeVar("T")


class Hub:
    """The one at `endpoint`, else at $HF_ENDPOINT; with the account's token, if there is one.

    After `attempts` in a row that brought nothing it is given up; `pause` waits so many seconds
    between them. Files of more bytes than `http_limit` are left to huggingface_hub, since the hub
    sends them in chunks of its own only.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        attempts: int = 6,
        pause: Callable[[float], None] = time.sleep,
        http_limit: int = constants.MAX_HTTP_DOWNLOAD_SIZE,
    ) -> None:
        disable_progress_bars()
        self.endpoint = endpoint or constants.ENDPOINT
        self._api = HfApi(endpoint=self.endpoint)
        self._attempts = attempts
        self._pause = pause
        self._http_limit = http_limit

    def commit(self, repo: str, revision: str, timeout_s: float = 10.0) -> str:
        """What `revision` (a branch, a tag or a commit) stands for now.

        Raises:
            WeightsMissing: there is no such repository or revision, or it is closed to us.
            HubUnreachable: no answer.
        """
        ask = partial(self._api.model_info, repo, revision=revision, timeout=timeout_s)
        found = self._patiently(repo, revision, ask, grown=lambda: False).sha
        if not found:
            raise WeightsMissing(f"{repo}: {self.endpoint} names no commit of {revision}")
        return found

    def files(self, repo: str, commit: str) -> tuple[HubFile, ...]:
        """All files of the repository.

        Raises:
            WeightsMissing, HubUnreachable: as `commit`.
        """

        def ask() -> list[Any]:
            return list(self._api.list_repo_tree(repo, recursive=True, revision=commit))

        entries = self._patiently(repo, commit, ask, grown=lambda: False)
        return tuple(self._file(repo, entry) for entry in entries if isinstance(entry, RepoFile))

    def _file(self, repo: str, entry: RepoFile) -> HubFile:
        found = HubFile(
            path=entry.path,
            size_bytes=entry.lfs.size if entry.lfs else entry.size,
            checksum=entry.lfs.sha256 if entry.lfs else entry.blob_id,
        )
        path = PurePosixPath(found.path)
        if path.is_absolute() or ".." in path.parts or not CHECKSUM.fullmatch(found.checksum):
            raise WeightsMissing(f"{repo}: {self.endpoint} lists a file that cannot be: {found}")
        return found

    def download(self, repo: str, commit: str, file: HubFile, blob: Path) -> None:
        """Fetch `file` into `blob`, which appears when it is whole and right by its checksum.

        What an attempt before left in `BLOB.incomplete` is gone on with. The blob lies where the
        cache's layout wants it: CACHE/models--ORG--NAME/blobs/CHECKSUM.

        Raises:
            WeightsMissing: the hub refuses, or sends other bytes twice.
            HubUnreachable: no byte came in several attempts.
            OSError: the disk is full or broken.
        """
        if file.size_bytes > self._http_limit:
            self._leave_to_library(repo, commit, file, blob)
            return
        unfinished = partial_of(blob)
        found = ""
        for _ in range(2):
            self._fill(repo, commit, file, unfinished)
            found = checksum(unfinished, like=file.checksum)
            if found == file.checksum:
                unfinished.rename(blob)
                return
            unfinished.unlink()
        raise self._damaged(repo, file, found)

    def _damaged(self, repo: str, file: HubFile, found: str) -> WeightsMissing:
        return WeightsMissing(
            f"{repo}/{file.path}: its checksum is {found} instead of {file.checksum}, twice: what "
            f"{self.endpoint} or a proxy before it sends is damaged"
        )

    def _leave_to_library(self, repo: str, commit: str, file: HubFile, blob: Path) -> None:
        def get() -> None:
            hf_hub_download(
                repo,
                file.path,
                revision=commit,
                cache_dir=blob.parents[2],
                endpoint=self.endpoint,
            )

        self._patiently(repo, commit, get, grown=lambda: False)
        found = checksum(blob, like=file.checksum)
        if found != file.checksum:
            blob.unlink()
            raise self._damaged(repo, file, found)

    def _fill(self, repo: str, commit: str, file: HubFile, unfinished: Path) -> None:
        url = hf_hub_url(repo, file.path, revision=commit, endpoint=self.endpoint)
        headers = build_hf_headers() | {"accept-encoding": "identity"}  # ranges are of the file
        size = 0

        def get() -> None:
            with unfinished.open("ab") as out:
                if out.tell() < file.size_bytes or file.size_bytes == 0:
                    http_get(
                        *(url, out),
                        resume_size=out.tell(),
                        headers=headers,
                        expected_size=file.size_bytes,
                    )

        def grown() -> bool:
            nonlocal size
            before, size = size, unfinished.stat().st_size
            return size > before

        self._patiently(repo, commit, get, grown)

    def _patiently(
        self, repo: str, revision: str, ask: Callable[[], T], grown: Callable[[], bool]
    ) -> T:
        """Ask until there is an answer; only so many times in a row in which nothing has `grown`."""
        failures = 0
        while True:
            try:
                with self._told(repo, revision):
                    return ask()
            except HubUnreachable:
                failures = 0 if grown() else failures + 1
                if failures >= self._attempts:
                    raise
                self._pause(min(2.0**failures, 30.0))

    @contextmanager
    def _told(self, repo: str, revision: str) -> Iterator[None]:
        """What the hub's library raises, as our errors with a way out."""
        try:
            yield
        except GatedRepoError as error:
            raise WeightsMissing(
                f"{repo} is gated: accept its terms on {self.endpoint}/{repo}, and give "
                f"{socket.gethostname()} a token of that account (HF_TOKEN, or `hf auth login`)"
            ) from error
        except RevisionNotFoundError as error:
            raise WeightsMissing(f"{repo} has no revision {revision!r}") from error
        except RepositoryNotFoundError as error:
            raise WeightsMissing(
                f"{self.endpoint} knows no repository {repo}, or shows it only to accounts that "
                f"may see it: check the name, and HF_TOKEN on {socket.gethostname()}"
            ) from error
        except HfHubHTTPError as error:
            raise self._of_status(repo, error) from error
        except (_TRANSPORT, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of this machine: the disk is full
            raise HubUnreachable(
                f"{repo}: {self.endpoint} cannot be reached from {socket.gethostname()}: "
                f"{_first_line(error)}. Set HTTPS_PROXY, or HF_ENDPOINT to a mirror"
            ) from error

    def _of_status(self, repo: str, error: HfHubHTTPError) -> WeightsMissing:
        status = error.response.status_code
        text = f"{repo}: {self.endpoint} answers {status}"
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            return HubUnreachable(f"{text}, too many requests: a token (HF_TOKEN) is granted more")
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.REQUEST_TIMEOUT:
            return HubUnreachable(f"{text}, a trouble of its own: try again later")
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            return WeightsMissing(
                f"{text}: give {socket.gethostname()} a token that may read it (HF_TOKEN)"
            )
        return WeightsMissing(f"{text}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
