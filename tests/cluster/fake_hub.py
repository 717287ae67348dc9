"""A Hugging Face hub on loopback: listings, files from any byte on, and a count of what it sent.

It can be told to be slow, to break off, to send other bytes, and to refuse.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

LARGE = 1000  # bytes from which on a file is in large-file storage
_BLOCK = 64 * 1024


@dataclass
class Fault:
    """What happens to the next requests for contents of files whose path ends so."""

    path: str = ""
    times: int = 1
    cut_after: int | None = None  # bytes, then the connection ends
    status: int | None = None
    flip: bool = False  # another byte in the middle


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self._answer_for(body=True)

    def do_HEAD(self) -> None:
        self._answer_for(body=False)

    def _answer_for(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        repo, kind, revision, rest = _parts(path)
        files = self.server.revisions.get((repo, revision))
        if self.server.refuse is not None:
            self._json({"error": "refused"}, status=self.server.refuse)
        elif files is None:
            known = any(name == repo for name, _ in self.server.revisions)
            code = "RevisionNotFound" if known else "RepoNotFound"
            self._json({"error": "not found"}, status=404, code=code)
        elif kind == "info":
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": repo, "sha": commit_of(files), "siblings": siblings})
        elif kind == "tree":
            self._json([_entry(name, content) for name, content in files.items()])
        elif rest not in files:
            self._json({"error": "not found"}, status=404, code="EntryNotFound")
        else:
            self._content(rest, files, body=body)

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        paths = json.loads(self.rfile.read(length) or b"{}").get("paths", [])
        repo, _, revision, _ = _parts(self.path)
        files = self.server.revisions.get((repo, revision), {})
        self._json([_entry(name, files[name]) for name in paths if name in files])

    def log_message(self, *_: Any) -> None:
        pass

    def _content(self, path: str, files: Mapping[str, bytes], *, body: bool) -> None:
        content = files[path]
        fault = self.server.fault_for(path) if body else Fault()
        if fault.status is not None:
            self._json({"error": "a fault"}, status=fault.status)
            return
        if fault.flip:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        wanted = self.headers.get("range", "")
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        part = content[int(first or 0) : int(last) + 1 if last else None]
        self.send_response(206 if wanted else 200)
        self.send_header("content-length", str(len(part)))
        self.send_header("etag", f'"{_checksum(files[path])}"')
        self.send_header("x-repo-commit", commit_of(files))
        if wanted:
            end = int(first or 0) + len(part) - 1
            self.send_header("content-range", f"bytes {first}-{end}/{len(content)}")
        self.end_headers()
        if body:
            if not last:  # headers are read in pieces
                self.server.starts.append((path, int(first or 0)))
            self._send(part, fault.cut_after)

    def _send(self, part: bytes, cut_after: int | None) -> None:
        sent = part if cut_after is None else part[:cut_after]
        self.server.sent.append(len(sent))
        for start in range(0, len(sent), _BLOCK):
            block = sent[start : start + _BLOCK]
            try:
                self.wfile.write(block)
            except OSError:  # whoever asked is gone
                self.close_connection = True
                return
            if self.server.bytes_per_s is not None:
                time.sleep(len(block) / self.server.bytes_per_s)
        if len(sent) < len(part):
            self.close_connection = True

    def _json(self, value: Any, status: int = 200, code: str = "") -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        if code:
            self.send_header("x-error-code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class Hub(ThreadingHTTPServer):
    """Repositories by name and revision."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.revisions: dict[tuple[str, str], Mapping[str, bytes]] = {}
        self.asked: list[str] = []
        self.sent: list[int] = []  # lengths of all answers with contents
        self.starts: list[tuple[str, int]] = []  # files asked for to their ends, from which byte on
        self.faults: list[Fault] = []
        self.refuse: int | None = None  # a status for everything
        self.bytes_per_s: float | None = None
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def publish(self, repo: str, files: Mapping[str, bytes], revision: str = "main") -> str:
        """The commit that `revision` stands for from now on."""
        commit = commit_of(files)
        self.revisions[repo, revision] = self.revisions[repo, commit] = files
        return commit

    def fault_for(self, path: str) -> Fault:
        with self._lock:
            for fault in self.faults:
                if fault.times and path.endswith(fault.path):
                    fault.times -= 1
                    return fault
        return Fault()

    def handle_error(self, *_: Any) -> None:
        """A client that went in the middle is a test's doing."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


@contextmanager
def a_hub(repo: str, files: Mapping[str, bytes]):
    """Yields the endpoint and a list of the lengths of all answers with file contents."""
    with running_hub() as hub:
        hub.publish(repo, files)
        yield hub.url, hub.sent


def commit_of(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    for name, content in sorted(files.items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


def _parts(path: str) -> tuple[str, str, str, str]:
    """Repository, what is asked of it, revision and the rest of the path."""
    api, parts = "/api/models/", [unquote(part) for part in path.strip("/").split("/")]
    if path.startswith(api):
        parts = parts[2:]
        repo = "/".join(parts[:2])
        if len(parts) < 4:
            return repo, "info", "main", ""
        kind = "info" if parts[2] == "revision" else "tree"
        return repo, kind, parts[3], "/".join(parts[4:])
    return "/".join(parts[:2]), "resolve", parts[3] if len(parts) > 3 else "", "/".join(parts[4:])


def _checksum(content: bytes) -> str:
    if len(content) >= LARGE:
        return hashlib.sha256(content).hexdigest()
    return _git_hash(content)


def _git_hash(content: bytes) -> str:
    head = f"blob {len(content)}\0".encode()
    return hashlib.sha1(head + content, usedforsecurity=False).hexdigest()


def _entry(name: str, content: bytes) -> dict[str, Any]:
    oid = _git_hash(content)
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": oid}
    if len(content) >= LARGE:
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
    return entry
