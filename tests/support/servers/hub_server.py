"""The Hugging Face Hub's interface for one model on the loopback interface, for the real huggingface_hub client.

The client is led here by `HF_ENDPOINT`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".h5", ".safetensors", ".spm", ".model", ".bin")


class Hub:
    """What the server holds, how it answers, and what it was asked."""

    def __init__(self, repo: str, files: dict[str, bytes], **information: Any) -> None:
        self.repo = repo
        self.files = files
        self.information = information
        self.branches = {"main": "a" * 40}
        self.gated = False
        self.tokens = {"hf_consented": "somebody", "hf_other": "somebody else"}
        self.consented = {"hf_consented"}
        self.status: int | None = None
        self.busy = 0
        self.stumbles = 0
        self.cut = 0
        self.altered: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}
        self.asked: list[str] = []
        self.downloaded: list[str] = []
        self.ranges: list[str] = []
        self.beginnings: list[str] = []
        self.knows_ranges = True
        self.url = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one GET or HEAD of the client."""
        path = unquote(urlsplit(request.path).path)
        self.asked.append(path)
        if self.status or self.busy:
            self.busy = max(0, self.busy - 1)
            return self._refuse(request, self.status or 429)
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            return self._refuse(request, 401, message="Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return self._send(request, json.dumps({"name": self.tokens[token], "type": "user"}).encode())
        model = f"/api/models/{self.repo}"
        if path == f"{model}/auth-check":
            return self._may(request, token) and self._send(request, b"OK")
        if path.startswith(f"{model}/revision/"):
            revision = path.removeprefix(f"{model}/revision/")
            commit = self.branches.get(revision, revision)
            if commit not in self.branches.values():
                return self._refuse(request, 404, "RevisionNotFound")
            return self._send(request, json.dumps(self._description(commit)).encode())
        if path.startswith(f"/{self.repo}/resolve/"):
            commit, _, name = path.removeprefix(f"/{self.repo}/resolve/").partition("/")
            if self._may(request, token):
                self._send_file(request, commit, name)
            return None
        # What the real one answers, so as not to tell which private models there are.
        return self._refuse(request, 404 if token else 401, "RepoNotFound")

    def _may(self, request: BaseHTTPRequestHandler, token: str) -> bool:
        if self.gated and token not in self.consented:
            self._refuse(request, 403 if token else 401, "GatedRepo")
            return False
        return True

    def _description(self, commit: str) -> dict[str, Any]:
        siblings = []
        for name, content in self.files.items():
            size = self.sizes.get(name, len(content))
            about: dict[str, Any] = {"rfilename": name, "size": size, "blobId": git_object(content)}
            if name.endswith(LARGE):
                about["lfs"] = {
                    "size": size,
                    "sha256": hashlib.sha256(content).hexdigest(),
                    "pointerSize": 130,
                }
            siblings.append(about)
        gated = "manual" if self.gated else False
        return {"id": self.repo, "sha": commit, "gated": gated, "siblings": siblings, **self.information}

    def _send_file(self, request: BaseHTTPRequestHandler, commit: str, name: str) -> None:
        content = self.altered.get(name, self.files[name])
        digest = hashlib.sha256(self.files[name]).hexdigest() if name.endswith(LARGE) else git_object(self.files[name])
        if self.stumbles and request.command == "GET":
            self.stumbles -= 1
            return self._refuse(request, 500)
        start, end = 0, len(content)
        wanted = request.headers.get("Range", "") if self.knows_ranges else ""
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, len(content)) if last else len(content)
        request.send_response(206 if wanted else 200)
        request.send_header("X-Repo-Commit", commit)
        request.send_header("ETag", f'"{digest}"')
        request.send_header("Content-Length", str(end - start))
        if wanted:
            request.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        request.end_headers()
        if request.command == "HEAD":
            return
        if request.headers.get("Range", "").startswith("bytes=0-"):
            self.beginnings.append(name)
        else:
            self.downloaded.append(name)
            self.ranges += [wanted] if wanted else []
            if name == "model.safetensors" and self.cut:
                end, self.cut = start + self.cut, 0
                request.close_connection = True
        request.wfile.write(content[start:end])

    def _refuse(self, request: BaseHTTPRequestHandler, status: int, code: str = "", message: str = "") -> None:
        request.send_response(status)
        for key, value in (("X-Error-Code", code), ("X-Error-Message", message), ("Retry-After", "0")):
            if value:
                request.send_header(key, value)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _send(self, request: BaseHTTPRequestHandler, content: bytes) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)


def git_object(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Run the server on a free port while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            with contextlib.suppress(ConnectionError):
                hub.answer(self)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def hub_environment(url: str, home: Path) -> dict[str, str]:
    """Return the environment in which huggingface_hub asks this server, with no token of anybody's."""
    return {
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "HF_ENDPOINT": url,
        "HF_TOKEN": "",
        "HUGGING_FACE_HUB_TOKEN": "",
        "HF_OIDC_RESOURCE": "",
        "HF_HUB_OFFLINE": "",
        "no_proxy": "127.0.0.1",
        "NO_PROXY": "127.0.0.1",
    }
