"""A real browser, spoken to over its debugging pipe."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def in_a_browser(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that opens pages: all of them run in one process, which starts one browser."""
    missing = pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is on PATH")
    return pytest.mark.xdist_group("browser")(missing(test))


class Browser:
    """Headless Chromium with one page; `send` is a call of the Chrome DevTools Protocol, `events` is what it told."""

    def __init__(self, profile: Path):
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # The browser reads from 3 and writes to 4; numbers from 10 on cannot collide with those while they are set.
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out)]

        def place() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self.process = subprocess.Popen(
            [
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--hide-scrollbars",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={profile}",
                "--remote-debugging-pipe",
                "about:blank",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            start_new_session=True,
            preexec_fn=place,
        )
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self.read_end, self.write_end = ours_in, ours_out
        self.buffer, self.number, self.events, self.session = b"", 0, [], None
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def receive(self) -> dict:
        while b"\0" not in self.buffer:
            ready, *_ = select.select([self.read_end], [], [], 60)
            assert ready, "the browser has said nothing for a minute"
            block = os.read(self.read_end, 1 << 20)
            assert block, "the browser has ended"
            self.buffer += block
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int = 1280, height: int = 900, media: str = "", dark: bool = False) -> None:
        self.events.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.send("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def run(self, script: str):
        """Return the value of a script's last expression."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def said(self, method: str) -> list[dict]:
        """Return the parameters of the events of one kind since the page was opened, waiting a moment for late ones."""
        until = time.monotonic() + 0.3
        while (left := until - time.monotonic()) > 0 and select.select([self.read_end], [], [], left)[0]:
            self.events.append(self.receive())
        return [event["params"] for event in self.events if event["method"] == method]

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.read_end)
        os.close(self.write_end)
