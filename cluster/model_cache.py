"""ModelCache: the checkpoints that a node holds for all its replicas, and how they come there.

The folder is Hugging Face's own hub cache, in its layout, so that what other programs downloaded is
found, and they find what we did. One replica of a node downloads, the others wait for it; what was
cut short goes on where it ended; every file is compared with its checksum once, and again when it
has changed on disk.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from cluster.cache_limits import GIB, CacheLimits
from cluster.cache_room import make_room
from cluster.cached_repo import CachedRepo
from cluster.errors import HubUnreachable, WeightsMissing
from cluster.hub_file import HubFile
from cluster.probes.host import cache_folder
from cluster.weight_files import CheckpointFormat, nothing_of, wanted_files

WORKERS = 8
DOWNLOADING = "downloading weights"  # how what is told begins while bytes come
_POLL_S = 0.3

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of which repository. `revision`: branch, tag or commit.

    `commit`: that it stood for when this was decided; empty: what it stands for now.
    """

    repo: str
    revision: str = "main"
    commit: str = ""
    checkpoint_format: CheckpointFormat = "hf"
    precision: str = ""  # chooses among GGUF files


def silent(_: str) -> None:
    """Tell nobody."""


class ModelCache:
    """In `folder`, by default where Hugging Face's programs look on this host.

    Without a `hub` nothing is downloaded: what is not there is an error. Neither into a folder that
    is `read_only` (None: as it is for this account), of which nothing is compared either.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        hub: AnsweringHub | None,
        limits: CacheLimits | None = None,
        read_only: bool | None = None,
    ) -> None:
        self.folder = (folder or cache_folder()).expanduser().resolve()
        self._hub = hub
        self._limits = limits or CacheLimits()
        self._read_only = _is_read_only(self.folder) if read_only is None else read_only

    def find(self, wanted: Wanted) -> Path | None:
        """The snapshot's folder, if all of it is here and was compared; asks no hub."""
        repo = CachedRepo(self.folder, wanted.repo)
        commit = wanted.commit or repo.commit(wanted.revision)
        files = repo.files(commit) if commit else None
        if commit is None or files is None or repo.missing(commit, _chosen(wanted, files)):
            return None
        return repo.snapshot(commit)

    def keep(self, wanted: Wanted, snapshot: Path) -> bool:
        """While this process lives nobody on this node evicts it; False: somebody just did."""
        if not self._read_only:
            CachedRepo(self.folder, wanted.repo).keep_in_use(snapshot.name)
        return snapshot.is_dir()

    def fetch(self, wanted: Wanted, tell: Callable[[str], None] = silent) -> Path:
        """The folder with the files of `wanted`, downloaded if need be; blocks meanwhile.

        `tell` is given a few words whenever it comes further.

        Raises:
            WeightsMissing: it cannot be had; the message names host, folder and the way out.
        """
        repo = CachedRepo(self.folder, wanted.repo)
        if self._read_only:
            return self._as_it_is(repo, wanted)
        told = _Told(tell)
        try:
            commit = self._commit(repo, wanted, told)
            with repo.in_use(commit):
                files = self._files(repo, commit, wanted)
                if repo.missing(commit, files):
                    self._bring(repo, commit, files, told)
                repo.point(wanted.revision, commit)
        except OSError as error:
            raise self._disk_refuses(wanted, error) from error
        return repo.snapshot(commit)

    def _as_it_is(self, repo: CachedRepo, wanted: Wanted) -> Path:
        """From a folder that others fill, to which we may not write."""
        commit = wanted.commit or repo.commit(wanted.revision)
        if commit is None or not repo.snapshot(commit).is_dir():
            raise self._offline(wanted, "nothing of it is there, and the folder is read-only")
        chosen = _chosen(wanted, repo.files(commit) or repo.found_files(commit))
        missing = [each.path for each in chosen if not (repo.snapshot(commit) / each.path).exists()]
        if missing or not chosen:
            raise self._offline(wanted, f"{_some(missing)}, and the folder is read-only")
        return repo.snapshot(commit)

    def _commit(self, repo: CachedRepo, wanted: Wanted, told: _Told) -> str:
        known = wanted.commit or repo.commit(wanted.revision)
        if known is not None and known in (wanted.commit, wanted.revision):
            return known
        if self._hub is None:
            if known is None:
                raise self._offline(wanted, "nothing of it is there")
            return known
        try:
            return self._hub.commit(wanted.repo, wanted.revision)
        except HubUnreachable:
            if known is None:
                raise
            told(f"the hub does not answer: taking {known[:12]}, which is here")
            return known

    def _files(self, repo: CachedRepo, commit: str, wanted: Wanted) -> list[HubFile]:
        files = repo.files(commit) or self._listed(repo, commit) or repo.found_files(commit)
        if not files:
            raise self._offline(wanted, "nothing of it is there")
        chosen = _chosen(wanted, files)
        if not chosen:
            nothing = nothing_of(wanted.checkpoint_format, wanted.precision)
            raise WeightsMissing(f"{wanted.repo} holds {nothing} among its {len(files)} files")
        return chosen

    def _listed(self, repo: CachedRepo, commit: str) -> tuple[HubFile, ...]:
        """As the hub lists it; empty: it does not, but others have left files of it here."""
        if self._hub is None:
            return ()
        try:
            files = self._hub.files(repo.name, commit)
        except HubUnreachable:
            if not repo.found_files(commit):
                raise
            return ()
        repo.keep_files(commit, files)
        return files

    def _bring(self, repo: CachedRepo, commit: str, files: Sequence[HubFile], told: _Told) -> None:
        total = sum(file.size_bytes for file in files)
        while True:
            with repo.downloading() as ours:
                if ours:
                    self._check_and_download(repo, commit, files, told)
                    return
            present = repo.present_bytes(files)
            told(f"waiting for another replica's download, {_share(present, total)}")
            time.sleep(_POLL_S)
            if not repo.missing(commit, files):
                return

    def _check_and_download(
        self, repo: CachedRepo, commit: str, files: Sequence[HubFile], told: _Told
    ) -> None:
        left = repo.missing(commit, files)
        doubtful = [file for file in left if repo.blob(file).is_file()]
        if doubtful:
            told(f"comparing {len(doubtful)} files with their checksums")
            right = _in_threads(repo.check, doubtful, lambda: None)
            good = [file for file, whole in zip(doubtful, right, strict=True) if whole]
            bad = [file.path for file in doubtful if file not in good]
            if bad:
                told(f"damaged on disk: {', '.join(bad)}")
            repo.link(commit, good)
            left = [file for file in left if file not in good]
        if left:
            self._download(repo, commit, files, left, told)

    def _download(
        self,
        repo: CachedRepo,
        commit: str,
        files: Sequence[HubFile],
        left: Sequence[HubFile],
        told: _Told,
    ) -> None:
        hub = self._hub
        if hub is None:
            raise self._offline(Wanted(repo.name, commit), _some(file.path for file in left))
        repo.snapshot(commit).mkdir(parents=True, exist_ok=True)  # keeps blobs of it from eviction
        (repo.path / "blobs").mkdir(exist_ok=True)
        total = sum(file.size_bytes for file in files)
        there = total - sum(file.size_bytes for file in left)
        # Large ones first: the last to end is then a small one. The same bytes are fetched once.
        unique = {file.checksum: file for file in left}.values()
        ordered = sorted(unique, key=lambda file: -file.size_bytes)
        more = sum(file.size_bytes for file in ordered) - repo.present_bytes(ordered)
        make_room(self.folder, self._limits, repo, files, more)

        def tell() -> None:
            told(f"{DOWNLOADING}, {_share(there + repo.present_bytes(left), total)}")

        tell()
        _in_threads(
            lambda file: hub.download(repo.name, commit, file, repo.blob(file)), ordered, tell
        )
        repo.link(commit, left)

    def _offline(self, wanted: Wanted, missing: str) -> WeightsMissing:
        return WeightsMissing(
            f"{wanted.repo} ({wanted.revision}) must come from {self.folder} on "
            f"{socket.gethostname()}, since nothing is downloaded there, but {missing}. Copy it there from a host "
            f"that has it, or allow downloads (model_cache.offline in the fleet, "
            f"HF_HUB_OFFLINE on the host)"
        )

    def _disk_refuses(self, wanted: Wanted, error: OSError) -> WeightsMissing:
        text = f"{wanted.repo} cannot be kept in {self.folder} on {socket.gethostname()}"
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(_existing(self.folder)).free
            return WeightsMissing(f"{text}: the disk is full, {free:,} bytes are free")
        where = f" ({error.filename})" if error.filename else ""
        return WeightsMissing(
            f"{text}: {error.strerror}{where}. Give bora's account the folder, or set HF_HOME"
        )


class AnsweringHub(Protocol):
    """What is asked of a hub (`cluster.hub`)."""

    def commit(self, repo: str, revision: str) -> str:
        """What `revision` stands for."""
        ...

    def files(self, repo: str, commit: str) -> tuple[HubFile, ...]:
        """All files of the repository."""
        ...

    def download(self, repo: str, commit: str, file: HubFile, blob: Path) -> None:
        """Make `blob` from it."""
        ...


class _Told:
    """Says nothing twice in a row."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._last = ""

    def __call__(self, text: str) -> None:
        if text != self._last:
            self._last = text
            self._tell(text)


def _is_read_only(folder: Path) -> bool:
    return not os.access(_existing(folder), os.W_OK)


def _existing(folder: Path) -> Path:
    """It, or the folder in which it will be."""
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _chosen(wanted: Wanted, files: Iterable[HubFile]) -> list[HubFile]:
    by_path = {file.path: file for file in files}
    names = wanted_files(by_path, wanted.checkpoint_format, wanted.precision)
    return [by_path[name] for name in names]


def _in_threads(
    act: Callable[[HubFile], R], files: Iterable[HubFile], meanwhile: Callable[[], None]
) -> list[R]:
    """`act` on all, several at a time; the first error stops those that have not begun."""
    with ThreadPoolExecutor(WORKERS) as pool:
        futures: list[Future[R]] = [pool.submit(act, file) for file in files]
        running = set(futures)
        while running:
            done, running = wait(running, timeout=_POLL_S)
            meanwhile()
            if any(future.exception() for future in done):
                pool.shutdown(wait=True, cancel_futures=True)
                break
        errors = [each.exception() for each in futures if each.done() and not each.cancelled()]
        for error in errors:
            if error is not None:
                raise error
    return [future.result() for future in futures]


def _share(part: int, total: int) -> str:
    percent = 100 * part // max(total, 1)
    size = f"{total / GIB:.1f} GiB" if total >= GIB else f"{total / 2**20:.1f} MiB"
    return f"{percent} % of {size}"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{rest} {'is' if len(names) == 1 else 'are'} missing"
