"""Kaggle's interface for model files on the loopback interface, for the real kagglehub client.

kagglehub knows only Kaggle's own addresses; with `KAGGLE_API_ENVIRONMENT=LOCALHOST` and a proxy it can be led here, on
any free port.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Kaggle:
    """What the server holds, how it answers, and what it was asked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.status = 200
        self.cut: int | None = None
        self.wrong_hash = False
        self.asked: list[str] = []
        self.authorizations: set[str | None] = set()
        self.url = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one POST of the client."""
        body = json.loads(request.rfile.read(int(request.headers.get("Content-Length", 0))) or b"{}")
        self.authorizations.add(request.headers.get("Authorization"))
        if self.status != 200:
            text = json.dumps({"code": self.status, "message": "as the test wants it"}).encode()
            return self._send(request, self.status, "application/json", text)
        if request.path.endswith("ListModelInstanceVersionFiles"):
            listing = {"files": [{"name": name, "size": len(self.files[name])} for name in self.files]}
            return self._send(request, 200, "application/json", json.dumps(listing | {"nextPageToken": ""}).encode())
        self.asked.append(body["path"])
        return self._send(request, 200, "application/octet-stream", self.files[body["path"]], self.cut)

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, kind: str, content: bytes, cut: int | None = None
    ) -> None:
        digest = base64.b64encode(hashlib.md5(b"other" if self.wrong_hash else content).digest()).decode()
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(content)))
        request.send_header("x-goog-hash", f"md5={digest}")
        request.end_headers()
        request.wfile.write(content[:cut])
        request.close_connection = True


@contextlib.contextmanager
def serving(kaggle: Kaggle) -> Iterator[Kaggle]:
    """Run the server on a free port while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with contextlib.suppress(ConnectionError):
                kaggle.answer(self)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    kaggle.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield kaggle
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def kaggle_environment(url: str, home: Path) -> dict[str, str]:
    """Return the environment in which kagglehub asks this server, with no credentials of anybody's."""
    return {
        "HOME": str(home),
        "KAGGLE_CONFIG_DIR": str(home / "none"),
        "KAGGLEHUB_CACHE": str(home / "kagglehub"),
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "KAGGLE_API_TOKEN": "",
        "KAGGLE_USERNAME": "",
        "KAGGLE_KEY": "",
        "http_proxy": url,
        "HTTP_PROXY": url,
        "no_proxy": "",
        "NO_PROXY": "",
    }
