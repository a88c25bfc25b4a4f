"""Kaggle's interface for model files on the loopback interface, for the real kagglehub client.

kagglehub knows only Kaggle's own addresses; with `KAGGLE_API_ENVIRONMENT=LOCALHOST` and a proxy it can be led here, on
any free port. As at Kaggle, a file comes from another host than the interface, which the answer leads to.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.fake_preset import make_preset

STORAGE = "http://storage.localhost/"
HANDLE = "kaggle://keras/tiny/keras/tiny_gemma/3"
SIGNATURE = "signature-of-storage"


class Kaggle:
    """What the server holds, how it answers, and what it was asked.

    Attributes:
        files: the model's files.
        status: the status of all answers of the interface.
        statuses: for the next answers of the interface; `status` when used up.
        retry_after: the header of answers that are errors; None for none.
        need_consent: downloads are refused with 403.
        accepted: Authorization headers that are known; None for all.
        cut: bytes after which a file breaks off.
        wrong_hash: files come with another MD5 than their own.
        pause_seconds: in the middle of each file.
        page: files a page of the listing.
        requests: all requests, whatever for.
        asked: the files that were asked for; `ranges` where each began.
        authorizations: the headers that the interface got; `storage_authorizations` those that the storage got.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.status = 200
        self.statuses: list[int] = []
        self.retry_after: str | None = None
        self.need_consent = False
        self.accepted: set[str] | None = None
        self.cut: int | None = None
        self.wrong_hash = False
        self.pause_seconds = 0.0
        self.page = 100
        self.requests: list[str] = []
        self.asked: list[str] = []
        self.ranges: list[int] = []
        self.authorizations: set[str | None] = set()
        self.storage_authorizations: set[str | None] = set()
        self.mounted = ""
        self.started = threading.Event()
        self.url = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one POST of the client."""
        self.requests.append(request.path)
        body = json.loads(request.rfile.read(int(request.headers.get("Content-Length", 0))) or b"{}")
        authorization = request.headers.get("Authorization")
        self.authorizations.add(authorization)
        status = self.statuses.pop(0) if self.statuses else self.status
        if status == 200 and self.accepted is not None and authorization not in {None, *self.accepted}:
            status = 401
        if status != 200:
            return self._refuse(request, status)
        if request.path.endswith("DiagnosticsService/Hello"):
            return self._json(request, {"userName": "some\x1b[31mbody"})
        if request.path.endswith("AttachDatasourceUsingJwtRequest"):
            return self._json(request, {"wasSuccessful": True, "result": {"mountSlug": self.mounted}})
        if request.path.endswith("ListModelInstanceVersionFiles"):
            begin = int(body.get("pageToken") or 0)
            names = list(self.files)[begin : begin + self.page]
            more = str(begin + self.page) if begin + self.page < len(self.files) else ""
            listing = [{"name": name, "size": len(self.files[name])} for name in names]
            return self._json(request, {"files": listing, "nextPageToken": more})
        if self.need_consent:
            return self._refuse(request, 403)
        if "path" not in body:
            return self._refuse(request, 501)  # the archive of all files
        if body["path"] not in self.files:
            return self._refuse(request, 404)
        request.send_response(302)
        request.send_header("Location", f"{STORAGE}{body['path']}?X-Goog-Signature={SIGNATURE}")
        request.send_header("Content-Length", "0")
        request.end_headers()
        request.close_connection = True

    def hand_out(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one GET: a file from the storage, or the rest of one."""
        self.requests.append(request.path)
        self.storage_authorizations.add(request.headers.get("Authorization"))
        name = unquote(urlsplit(request.path).path).removeprefix("/")
        if request.path != f"{STORAGE}{name}?X-Goog-Signature={SIGNATURE}" or name not in self.files:
            return self._refuse(request, 404)
        content = self.files[name]
        begin = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.asked.append(name)
        self.ranges.append(begin)
        digest = base64.b64encode(hashlib.md5(b"other" if self.wrong_hash else content).digest()).decode()
        request.send_response(206 if begin else 200)
        request.send_header("Content-Type", "application/octet-stream")
        request.send_header("Content-Length", str(len(content) - begin))
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("x-goog-hash", f"md5={digest}")
        request.end_headers()
        rest = content[begin:][: self.cut]
        half = len(rest) // 2
        request.wfile.write(rest[:half])
        request.wfile.flush()
        if self.pause_seconds:
            self.started.set()
            time.sleep(self.pause_seconds)
        request.wfile.write(rest[half:])
        request.close_connection = True

    def _json(self, request: BaseHTTPRequestHandler, content: dict, status: int = 200) -> None:
        text = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(text)))
        if status != 200 and self.retry_after is not None:
            request.send_header("Retry-After", self.retry_after)
        request.end_headers()
        request.wfile.write(text)
        request.close_connection = True

    def _refuse(self, request: BaseHTTPRequestHandler, status: int) -> None:
        self._json(request, {"code": status, "message": "as the test wants it"}, status)


@contextlib.contextmanager
def serving(kaggle: Kaggle) -> Iterator[Kaggle]:
    """Run the server on a free port while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with contextlib.suppress(ConnectionError):
                kaggle.answer(self)

        def do_GET(self) -> None:
            with contextlib.suppress(ConnectionError):
                kaggle.hand_out(self)

        def do_CONNECT(self) -> None:
            kaggle.requests.append(self.path)
            self.send_error(403)

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


@contextlib.contextmanager
def for_this_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kaggle]:
    """Run the server with a preset of no particular content, and lead this process and its children to it.

    The home, kagglehub's cache and ours lie below the folder as `home`, `home/kagglehub` and `cache`.
    """
    preset = make_preset(folder / "original")
    files = {path.relative_to(preset).as_posix(): path.read_bytes() for path in preset.rglob("*") if path.is_file()}
    with serving(Kaggle(files)) as running:
        for name, value in kaggle_environment(running.url, folder / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("GEMMA_TUNING_CACHE", str(folder / "cache"))
        monkeypatch.setenv("TQDM_DISABLE", "1")
        yield running
        # What was typed in or found where kagglehub does not look is kept in memory.
        if "kagglehub.config" in sys.modules:
            sys.modules["kagglehub.config"].clear_kaggle_credentials()


def kaggle_environment(url: str, home: Path) -> dict[str, str]:
    """Return the environment in which kagglehub asks this server, with no credentials of anybody's."""
    proxies = {name: url for lower in ("http_proxy", "https_proxy", "all_proxy") for name in (lower, lower.upper())}
    return {
        "HOME": str(home),
        "KAGGLE_CONFIG_DIR": str(home / "none"),
        "KAGGLEHUB_CACHE": str(home / "kagglehub"),
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "KAGGLE_API_TOKEN": "",
        "KAGGLE_USERNAME": "",
        "KAGGLE_KEY": "",
        "no_proxy": "",
        "NO_PROXY": "",
        **proxies,
    }
