"""A Hugging Face hub on loopback: what HfFileSystem asks for, and a count of the bytes it took."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0" * 40


class Handler(BaseHTTPRequestHandler):
    """Answers from the server's `repo` and `files`."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path, repo, files = (
            unquote(self.path.partition("?")[0]),
            self.server.repo,
            self.server.files,
        )
        if path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/main"):
            siblings = [{"rfilename": name} for name in files]
            self._json({"id": repo, "sha": COMMIT, "siblings": siblings})
        elif path.startswith(f"/api/models/{repo}/tree/main"):
            self._json([_entry(name, content) for name, content in files.items()])
        elif path.startswith(f"/{repo}/resolve/main/"):
            self._content(files[path.removeprefix(f"/{repo}/resolve/main/")])
        else:
            self._json({"error": "not found"}, status=404)

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        paths = json.loads(self.rfile.read(length) or b"{}").get("paths", [])
        files = self.server.files
        self._json([_entry(name, files[name]) for name in paths if name in files])

    def log_message(self, *_: Any) -> None:
        pass

    def _content(self, content: bytes) -> None:
        wanted = self.headers.get("range", "bytes=0-").removeprefix("bytes=")
        first, _, last = wanted.partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        self.server.sent.append(len(part))
        self._answer(part, status=206, kind="application/octet-stream")

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(json.dumps(value).encode(), status=status, kind="application/json")

    def _answer(self, body: bytes, *, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        if status == 404:
            self.send_header("x-error-code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(body)


class Hub(ThreadingHTTPServer):
    """One repository."""

    def __init__(self, repo: str, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repo, self.files = repo, files
        self.sent: list[int] = []


@contextmanager
def a_hub(repo: str, files: Mapping[str, bytes]):
    """Yields the endpoint and a list of the lengths of all answers with file contents."""
    hub = Hub(repo, files)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{hub.server_address[1]}", hub.sent
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": "1" * 40}
