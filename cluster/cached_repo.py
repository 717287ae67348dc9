"""CachedRepo: one repository in a node's cache, in Hugging Face's own layout, and who uses it.

CACHE/models--ORG--NAME/blobs/CHECKSUM            contents; CHECKSUM.incomplete while they come
                        snapshots/COMMIT/PATH     links to blobs
                        refs/REVISION             the commit that it stood for
                        .bora/COMMIT.json         all files that the commit has
                        .bora/checked.json        blobs whose contents were compared
CACHE/.locks/models--ORG--NAME/bora-download.lock held while somebody downloads
                               bora-COMMIT.lock   shared by all who use the commit
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.files import replace_text
from cluster.hub_file import CHECKSUM, HubFile, checksum, partial_of
from cluster.weight_files import other_parts

_COMMIT = re.compile(r"[0-9a-f]{40}")
_INDEX = "*.safetensors.index.json"


class CachedRepo:
    """`name` (ORG/NAME) in the cache `folder`; it need not be there."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        directory = "--".join(("models", *name.split("/")))
        self.path = folder / directory
        self._locks = folder / ".locks" / directory
        self._download_lock = self._locks / "bora-download.lock"
        self._checked_file = self.path / ".bora" / "checked.json"

    def commit(self, revision: str) -> str | None:
        """What `revision` stood for when it was downloaded last; a commit stands for itself."""
        if _COMMIT.fullmatch(revision):
            return revision
        with contextlib.suppress(OSError):
            return (self.path / "refs" / revision).read_text(encoding="utf-8").strip()
        return None

    def snapshot(self, commit: str) -> Path:
        """The folder with the files of that commit."""
        return self.path / "snapshots" / commit

    def blob(self, file: HubFile) -> Path:
        """Where its contents lie."""
        return self.path / "blobs" / file.checksum

    # What is there

    def files(self, commit: str) -> tuple[HubFile, ...] | None:
        """All files of the commit, as kept; None: it was never asked for by us."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            text = (self.path / ".bora" / f"{commit}.json").read_text(encoding="utf-8")
            return tuple(HubFile(*entry) for entry in json.loads(text))
        return None

    def keep_files(self, commit: str, files: Iterable[HubFile]) -> None:
        """Remember them: a commit never changes."""
        self._checked_file.parent.mkdir(parents=True, exist_ok=True)
        entries = [[file.path, file.size_bytes, file.checksum] for file in files]
        replace_text(self._checked_file.parent / f"{commit}.json", json.dumps(entries))

    def found_files(self, commit: str) -> tuple[HubFile, ...]:
        """What lies in the snapshot that others made, and what its indices and parts name beside."""
        snapshot = self.snapshot(commit)
        found = {}
        for path in sorted(snapshot.rglob("*")):
            if path.is_file():
                name = path.relative_to(snapshot).as_posix()
                blob = path.resolve().name if path.is_symlink() else ""
                known = blob if CHECKSUM.fullmatch(blob) else ""
                found[name] = HubFile(name, path.stat().st_size, known)
        for index in snapshot.glob(_INDEX):
            with contextlib.suppress(OSError, ValueError, LookupError, AttributeError):
                for name in json.loads(index.read_bytes())["weight_map"].values():
                    found.setdefault(name, HubFile(name, 0, ""))
        for part in [other for name in found for other in other_parts(name)]:
            found.setdefault(part, HubFile(part, 0, ""))
        return tuple(found.values())

    def missing(self, commit: str, files: Iterable[HubFile]) -> list[HubFile]:
        """Those of `files` that are not in the snapshot in their full length and compared."""
        checked = self._checked()
        snapshot = self.snapshot(commit)
        return [file for file in files if not _is_there(snapshot / file.path, file, checked)]

    def present_bytes(self, files: Iterable[HubFile]) -> int:
        """How much of `files` has come so far."""
        return sum(self._present(file) for file in files)

    def _present(self, file: HubFile) -> int:
        blob = self.blob(file)
        for path in (blob, partial_of(blob)):
            with contextlib.suppress(OSError):
                return min(path.stat().st_size, file.size_bytes)
        # A download by huggingface_hub itself has a random name.
        sizes = [path.stat().st_size for path in blob.parent.glob(f"{blob.name}.*.incomplete")]
        return min(max(sizes, default=0), file.size_bytes)

    # What comes

    def check(self, file: HubFile) -> bool:
        """Compare a blob that is there; one that is damaged is taken away."""
        blob = self.blob(file)
        try:
            right = blob.stat().st_size == file.size_bytes
            right = right and checksum(blob, like=file.checksum) == file.checksum
        except FileNotFoundError:
            return False
        if not right:
            blob.unlink()
        return right

    def link(self, commit: str, files: Iterable[HubFile]) -> None:
        """Put compared blobs into the snapshot, and remember that they were compared."""
        files = tuple(files)
        checked = self._checked()
        for file in files:
            blob, path = self.blob(file), self.snapshot(commit) / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            target = os.path.relpath(blob, path.parent)
            if not path.is_symlink() or str(path.readlink()) != target:
                path.unlink(missing_ok=True)
                path.symlink_to(target)
            checked[file.checksum] = _stamp(blob)
        if files:
            self._checked_file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self._checked_file, json.dumps(checked))

    def point(self, revision: str, commit: str) -> None:
        """From now on `revision` stands for `commit` where no hub answers."""
        if revision != commit:
            ref = self.path / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            replace_text(ref, commit)

    def _checked(self) -> dict[str, list[int]]:
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads(self._checked_file.read_text(encoding="utf-8")))
        return {}

    # What goes

    def commits(self) -> list[str]:
        """Those that have a snapshot, whole or not."""
        return sorted(
            path.name for path in (self.path / "snapshots").glob("[!.]*") if path.is_dir()
        )

    def blobs_of(self, commit: str) -> set[Path]:
        """Contents of a snapshot that are there and lie in this repository, nowhere else."""
        return {blob for blob in self._linked(commit) if blob.is_file()}

    def _linked(self, commit: str) -> Iterator[Path]:
        for path in self.snapshot(commit).rglob("*"):
            target = path
            if path.is_symlink():
                target = Path(os.path.normpath(path.parent / path.readlink()))
                if target.parent != self.path / "blobs":
                    continue
            yield target

    def loose_blobs(self, needed: Collection[str] = ()) -> set[Path]:
        """Contents that no snapshot links to, of downloads that were never finished.

        Without what has a `needed` checksum: a download will go on with it.
        """
        linked = {blob for commit in self.commits() for blob in self.blobs_of(commit)}
        found = (blob for blob in (self.path / "blobs").glob("*") if blob.is_file())
        return {blob for blob in found if blob.name.partition(".")[0] not in needed} - linked

    def forget(self, commit: str) -> None:
        """Take a snapshot away, with what only it links to. Cut short, it is not there either."""
        others = (self.blobs_of(each) for each in self.commits() if each != commit)
        alone = self.blobs_of(commit).difference(*others)
        gone = self.path / "snapshots" / f".{commit}"
        shutil.rmtree(gone, ignore_errors=True)  # of somebody who was cut short
        self.snapshot(commit).rename(gone)
        for ref in (self.path / "refs").rglob("*"):
            if ref.is_file() and ref.read_text(encoding="utf-8").strip() == commit:
                ref.unlink()
        for blob in alone:
            blob.unlink(missing_ok=True)
        shutil.rmtree(gone)
        (self._checked_file.parent / f"{commit}.json").unlink(missing_ok=True)

    # Who uses it

    @contextmanager
    def in_use(self, commit: str) -> Iterator[None]:
        """Nobody evicts the commit meanwhile, on whatever process of this node. Counts as a use."""
        self._locks.mkdir(parents=True, exist_ok=True)
        with self._commit_lock(commit).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(file.fileno())
            yield

    def keep_in_use(self, commit: str) -> None:
        """As `in_use`, for as long as this process lives."""
        self._locks.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._commit_lock(commit), os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.utime(descriptor)

    @contextmanager
    def unused(self, commit: str) -> Iterator[bool]:
        """Whether nobody uses the commit; then nobody begins to meanwhile."""
        self._locks.mkdir(parents=True, exist_ok=True)
        used_s = self.used_s(commit)
        with self._commit_lock(commit).open("a") as file:
            os.utime(file.fileno(), (used_s, used_s))  # to be looked at is no use
            yield _locked_at_once(file.fileno())

    def is_used(self, commit: str) -> bool:
        """Whether somebody uses the commit now; changes nothing."""
        with contextlib.suppress(OSError), self._commit_lock(commit).open("rb") as file:
            return not _locked_at_once(file.fileno())
        return False

    @contextmanager
    def downloading(self) -> Iterator[bool]:
        """Whether we alone may download; False: somebody else does."""
        self._locks.mkdir(parents=True, exist_ok=True)
        with self._download_lock.open("a") as file:
            yield _locked_at_once(file.fileno())

    def reserve(self, more: int) -> None:
        """While we download, others count with so many more bytes."""
        self._download_lock.write_text(str(self.blob_bytes() + more), encoding="ascii")

    def reserved_bytes(self) -> int:
        """That somebody's download here will still take; 0: nobody downloads."""
        with self.downloading() as idle:
            if idle:
                return 0
        with contextlib.suppress(OSError, ValueError):
            reserved = int(self._download_lock.read_text(encoding="ascii"))
            return max(reserved - self.blob_bytes(), 0)
        return 0

    def blob_bytes(self) -> int:
        """Of all contents here, finished or not."""
        size = 0
        for blob in (self.path / "blobs").glob("*"):
            with contextlib.suppress(OSError):  # renamed or evicted meanwhile
                size += blob.stat().st_size
        return size

    def used_s(self, commit: str) -> float:
        """When it was used last (epoch seconds); of what only others used, when it came."""
        for path in (self._commit_lock(commit), self.snapshot(commit)):
            with contextlib.suppress(OSError):
                return path.stat().st_mtime
        return 0.0

    def _commit_lock(self, commit: str) -> Path:
        return self._locks / f"bora-{commit}.lock"


def _is_there(path: Path, file: HubFile, checked: dict[str, list[int]]) -> bool:
    try:
        right_size = path.stat().st_size == file.size_bytes
    except OSError:
        return False
    return right_size and (not file.checksum or checked.get(file.checksum) == _stamp(path))


def _stamp(path: Path) -> list[int]:
    """What changes when somebody writes to the file."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _locked_at_once(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
