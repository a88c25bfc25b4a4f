"""Tokens that stand for a user's, and the search for them: in files, and in the arguments of processes."""

from __future__ import annotations

import base64
import threading
from pathlib import Path

# Of no account: made up, in the form of real ones.
KAGGLE_TOKEN, HF_TOKEN = "KGAT_a-sentinel-of-nobodys-account", "hf_aSentinelOfNobodysAccount"


def forms(token):
    """A token as it could be written down: plain, in base64 wherever it may begin, and in UTF-16, raw or escaped."""
    found = [token.encode()]
    for before in ("", "a", "aa"):
        encoded = base64.b64encode((before + token).encode())
        # What goes before and after changes the letters at both ends.
        found.append(encoded[4:-4])
    for wide in ("utf-16-le", "utf-16-be"):
        found += [token.encode(wide), repr(token.encode(wide))[2:-1].encode()]
    return found


SENTINELS = [
    form
    for token in (  # Of no account: made up, in the form of real ones.
        KAGGLE_TOKEN,
        HF_TOKEN,
    )
    for form in forms(token)
]


def leaks(folder):
    """The files below a folder that hold a sentinel in one of its forms."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found += [str(path) for sentinel in SENTINELS if sentinel in content or sentinel in str(path).encode()]
    return found


class ArgumentsWatcher(threading.Thread):
    """Reads the arguments of all processes, again and again, and keeps those that hold a sentinel."""

    def __init__(self):
        super().__init__(daemon=True)
        self.found, self.seen, self.ended = set(), set(), threading.Event()

    def run(self):
        while not self.ended.wait(0.02):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    arguments = path.read_bytes()
                except OSError:  # ended meanwhile
                    continue
                self.seen.add(arguments)
                if any(sentinel in arguments for sentinel in SENTINELS):
                    self.found.add(arguments)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.join()
