"""A loopback server that speaks as much of the Hugging Face hub's API as its client needs.

    repos = {"org/name": {"config.json": b"...", "model.safetensors": b"..."}}
    with HubServer(repos) as hub:
        subprocess.run(..., env={**os.environ, **hub.env(tmp_path / "hf")})
        assert hub.requests == [...]

A key "org/name@v1" is another revision of "org/name". Commits, git and LFS checksums are those of
the content, so the client's own checks hold. The client reads HF_ENDPOINT when it is imported:
use it in a subprocess. Faults: `cut`, `corrupt`, `drop`, `gate`.
"""

import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import unquote, urlsplit

_LFS = (".safetensors", ".bin", ".model", ".gguf", ".pt")


class Request(NamedTuple):
    """One request as it came: the path is unquoted and has no query."""

    method: str
    path: str
    range: str | None


@dataclass
class _Cut:
    after: int
    times: int
    reset: bool


class HubServer:
    """Serves `repos`: repository -> file name -> content. A context manager.

    Attributes:
        url: what to set HF_ENDPOINT to.
        requests: everything asked so far, in order; clear it with `requests.clear()`.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        self.repos = repos
        self.requests: list[Request] = []
        self.cuts: dict[tuple[str, str], _Cut] = {}
        self.corrupted: set[tuple[str, str]] = set()
        self.dropped: set[tuple[str, str]] = set()
        self.gated: set[str] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        serve = self._server.serve_forever
        threading.Thread(target=serve, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def env(self, home: Path) -> dict[str, str]:
        """Variables for a client that uses this server and keeps everything under `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def cut(
        self, repo: str, file: str, *, after: int, times: int = 1, reset: bool = False
    ) -> None:
        """Close the connection after so many bytes of a download; `reset` gives no clean end."""
        self.cuts[repo, file] = _Cut(after, times, reset)

    def corrupt(self, repo: str, file: str) -> None:
        """Send one wrong byte in the middle of a file, under the right checksum."""
        self.corrupted.add((repo, file))

    def repair(self) -> None:
        """Undo every fault."""
        for faults in (self.corrupted, self.dropped, self.gated, self.cuts):
            faults.clear()

    def drop(self, repo: str, file: str) -> None:
        """List a file but answer 404 for it."""
        self.dropped.add((repo, file))

    def gate(self, repo: str) -> None:
        """List a repository but refuse its files, as the hub does before a licence is accepted."""
        self.gated.add(repo)

    def commit(self, repo: str, revision: str = "main") -> str | None:
        """The commit of a revision, which may be a commit itself; None if there is none."""
        for key, files in self.repos.items():
            name, _, branch = key.partition("@")
            names = json.dumps({file: _git_sha1(content) for file, content in files.items()})
            sha = _git_sha1(names.encode())
            if name == repo and revision in (branch or "main", sha):
                return sha
        return None

    def files(self, repo: str, revision: str) -> dict[str, bytes]:
        """The files at a revision that exists."""
        commit = self.commit(repo, revision)
        keys = [key for key in self.repos if key.partition("@")[0] == repo]
        return next(
            self.repos[key]
            for key in keys
            if self.commit(repo, key.partition("@")[2] or "main") == commit
        )

    def count(self, method: str, file: str) -> int:
        """How many requests of a method ended in this file name."""
        seen = Counter((r.method, r.path.rsplit("/", 1)[-1]) for r in self.requests)
        return seen[method, file]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range")))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        repos = {key.partition("@")[0] for key in self.hub.repos}
        if match is None or match[1] not in repos:
            self._error(401 if match else 404, "RepoNotFound" if match else "EntryNotFound")
        elif api:
            self._api(api[1], api[2] or "revision", api[3] or "main")
        elif file:
            self._file(file[1], file[2], file[3])

    def _api(self, repo: str, what: str, revision: str) -> None:
        commit = self.hub.commit(repo, revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        entries = [(n, c, _lfs(n, c)) for n, c in sorted(self.hub.files(repo, revision).items())]
        if what == "tree":
            return self._json(
                [
                    {"type": "file", "path": n, "size": len(c), "oid": _git_sha1(c)}
                    | ({"lfs": {"oid": lfs, "size": len(c), "pointerSize": 134}} if lfs else {})
                    for n, c, lfs in entries
                ]
            )
        siblings = [
            {"rfilename": n, "size": len(c), "blobId": _git_sha1(c)}
            | ({"lfs": {"sha256": lfs, "size": len(c), "pointerSize": 134}} if lfs else {})
            for n, c, lfs in entries
        ]
        self._json({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings})

    def _file(self, repo: str, revision: str, name: str) -> None:
        commit = self.hub.commit(repo, revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        content = self.hub.files(repo, revision).get(name)
        if repo in self.hub.gated:
            return self._error(401, "GatedRepo")
        if content is None or (repo, name) in self.hub.dropped:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        lfs = _lfs(name, content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{lfs or _git_sha1(content)}"'}
        if lfs:
            headers |= {"X-Linked-Etag": f'"{lfs}"', "X-Linked-Size": str(len(content))}
        start = int(re.sub(r"bytes=(\d+)-", r"\1", self.headers.get("Range") or "0"))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if (repo, name) in self.hub.corrupted:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        self._send(
            206 if start else 200, content[start:], headers, self.hub.cuts.get((repo, name))
        )

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})}
        self._send(status, b"", headers)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], cut: _Cut | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut is None or cut.times == 0:
            self.wfile.write(body)
            return
        cut.times -= 1
        self.wfile.write(body[: cut.after])
        self.wfile.flush()
        self.close_connection = True
        if cut.reset:  # closed with unsent data thrown away, which the kernel tells as a reset
            now = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
            os.close(self.connection.detach())


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _lfs(name: str, content: bytes) -> str | None:
    return hashlib.sha256(content).hexdigest() if name.endswith(_LFS) else None
