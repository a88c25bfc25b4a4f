"""Redaction: no token, password or signature of a download's address reaches the screen.

Purpose: messages of pip, kagglehub, huggingface_hub and of the libraries below them can hold requests, addresses and
headers. `guard_standard_error` filters standard error, so that errors, warnings, log lines and tracebacks of all
libraries pass the filter. Addresses that a token must not go to are refused here too.
Reads: the environment. Writes nothing.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import os
import re
import sys
import threading
from io import TextIOBase
from pathlib import Path
from typing import TextIO
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

from stages.core.common.errors import StageError

HIDDEN = "***"
SHORTEST = 6  # characters of a secret; hiding shorter ones would damage ordinary words
LONGEST = 200  # characters of another program's message that are shown
SECRET_NAMES = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
PROXIES = tuple(name for lower in ("http_proxy", "https_proxy", "all_proxy") for name in (lower, lower.upper()))
# Secrets recognized by position: what precedes an address' host; its query, which at storage servers is as good as a
# password, also after a path alone; and what a request's header authorizes with.
_SECRET_PLACES = (
    (re.compile(r"(?<=//)[^/\s]*@"), f"{HIDDEN}@"),
    (re.compile(r"(\w://[^\s?'\"<>]*)\?[^\s'\"<>)]+"), rf"\1?{HIDDEN}"),
    (re.compile(r"(/[^\s?'\"<>]*)\?[\w.%~-]+=[^\s'\"<>)]*"), rf"\1?{HIDDEN}"),
    (re.compile(r"\b(Bearer |Basic (?=[\w+/]{12}))[^\s'\"]+"), rf"\1{HIDDEN}"),
)
_remembered: set[str] = set()


def remember(*values: str) -> None:
    """Keep secrets that were found outside the environment (a file, a terminal) out of all messages from now on."""
    _remembered.update(values)


def usable(source: str, *values: str, of: str = "Kaggle") -> tuple[str, ...]:
    """Return the values, each checked to be one printable word: others break the request, with the secret in the error.

    The last, a token or a key, is kept out of all messages from now on.

    Args:
        source: where they were found.
        values: a token, or a user's name and key.
        of: whose credentials they are.

    Raises:
        StageError: names the source, not the value.
    """
    remember(values[-1])
    for value in values:
        if not (value.isascii() and value.isprintable() and " " not in value):
            raise StageError(
                f"{of} credentials must be printable ASCII without spaces. Received: other characters in {source}\n"
                "Copy them again, without quotation marks, spaces and line ends."
            )
    return values


def hide(text: str) -> str:
    """Return a text without secrets: plain, escaped, quoted for an address, or in base64 wherever it may begin."""
    forms = {form for secret in _secrets() for form in _forms(secret)}
    # The longest first: a secret may hold another.
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, HIDDEN)
    for pattern, replacement in _SECRET_PLACES:
        text = pattern.sub(replacement, text)
    return text


def brief(said: BaseException | str) -> str:
    """Return what another program said, on one line of at most 200 characters, without secrets.

    Addresses are shortened to their host, and Python's object addresses are removed.
    """
    text = " ".join(str(said).split()) or type(said).__name__
    text = re.sub(r"<[\w.]+ object at 0x[0-9a-f]+>: ", "", hide(text))
    text = re.sub(r"(\w+://[^/\s'\"]+/)[^\s'\")]+|(?<=with url: )\S+", r"\1...", text)
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def guard_standard_error() -> None:
    """Filter standard error for the rest of the process."""
    if sys.stderr is not None and not isinstance(sys.stderr, _Filtered):
        sys.stderr = _Filtered(sys.stderr)


class _Filtered(TextIOBase):
    """A text stream that passes on complete lines without secrets.

    It has no `buffer`: bytes would bypass the filter.
    """

    def __init__(self, stream: TextIO) -> None:
        """Wrap a stream."""
        self._stream, self._waiting, self._lock = stream, "", threading.RLock()

    encoding = property(lambda self: self._stream.encoding)
    errors = property(lambda self: self._stream.errors)

    def write(self, text: str) -> int:
        """Pass on complete lines, and buffer the rest."""
        with self._lock:
            self._waiting += text
            end = max(self._waiting.rfind("\n"), self._waiting.rfind("\r")) + 1
            if end:
                lines, self._waiting = self._waiting[:end], self._waiting[end:]
                self._stream.write(hide(lines))
        return len(text)

    def flush(self) -> None:
        """Pass on the rest too."""
        with self._lock:
            rest, self._waiting = self._waiting, ""
            if rest:
                self._stream.write(hide(rest))
            self._stream.flush()

    def isatty(self) -> bool:
        """Return what the stream returns."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Return what the stream returns."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """Return that it can be written to."""
        return True


def host_of(address: str) -> str:
    """Return an address' host, with its port if one is named.

    Raises:
        ValueError: it has none, or cannot be parsed: a password with a raw `#`, `/`, `?` or `@` splits it wrongly,
            and its parts would show up in messages as a host and a port.
    """
    address = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        raise ValueError("not an address") from None  # the error holds a part of the address
    behind = address.partition("://")[2].partition(parts.netloc)[2]
    if not parts.hostname or "@" in behind or parts.netloc.count("@") > 1 or re.search(r"\s", address):
        raise ValueError("not an address")
    return parts.hostname if port is None else f"{parts.hostname}:{port}"


def check_addresses(addresses: dict[str, str]) -> None:
    """Check that addresses can be taken apart, and keep the passwords in them out of messages.

    Args:
        addresses: what each address is called, and the address; one without a scheme is a proxy's.

    Raises:
        StageError: names the first that cannot, and does not show it.
    """
    for name, address in addresses.items():
        remember(*_passwords(address))
        try:
            host_of(address)
        except ValueError:
            raise StageError(
                f"{name} must be an address like https://host:port/path. Received: one that cannot be taken apart (not "
                "shown: it may hold a password)\nCorrect it; special characters of a password are written %23 for #, "
                "%2F for /, %3A for :, %3F for ?, %40 for @."
            ) from None


def check_proxies() -> None:
    """Check the addresses of the proxies in the environment.

    Raises:
        StageError: as `check_addresses`.
    """
    check_addresses({name: os.environ[name] for name in PROXIES if os.environ.get(name)})


def check_private(name: str, address: str) -> None:
    """Check that requests to an address cannot be read in transit: https, or this machine, without a remote proxy.

    Raises:
        StageError: a token sent there could be read.
    """
    if not is_private(address):
        raise StageError(
            f"{name} must be an https address: a token goes there with each request. "
            f"Received: {name}={address.partition('://')[0] if '://' in address else 'no scheme'}, {host_of(address)}\n"
            "Set it to the https address, or unset it. On this machine itself http will do, without a proxy elsewhere."
        )


def is_private(address: str) -> bool:
    """Return whether requests to an address cannot be read in transit."""
    parts = urlsplit(address)
    if parts.scheme == "https":
        return True
    host = parts.hostname or ""
    if parts.scheme != "http" or not _is_this_machine(host):
        return False
    proxies = getproxies()
    proxy = None if proxy_bypass(host) else proxies.get("http") or proxies.get("all")
    return proxy is None or _is_this_machine(urlsplit(proxy if "://" in proxy else f"//{proxy}").hostname or "")


def _is_this_machine(host: str) -> bool:
    """Return whether a host is the loopback interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _secrets() -> set[str]:
    """Return all known secrets that are long enough to be hidden, and their parts, since a message may break them."""
    found = set(_remembered)
    for name, value in os.environ.items():
        # A name that ends so may hold the path of a file with the secret, which is none.
        if SECRET_NAMES.search(name) and not _is_path(value):
            found.add(value)
        found.update(_passwords(value))
    for value in tuple(found):
        parts = re.split(r"[^\x21-\x7e]+", value)
        found.update(parts, ("".join(parts),))
    return {secret for secret in found if len(secret) >= SHORTEST}


def _is_path(value: str) -> bool:
    """Return whether a path exists."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        return bool(value) and Path(value).expanduser().exists()
    return False


def _passwords(text: str) -> set[str]:
    """Return the passwords in the addresses of a text, whole and in the parts that a wrong parse makes of them."""
    found = set()
    for before_host in re.findall(r"//(\S+)@", text):
        user, _, password = before_host.partition(":")
        found.update({password or user, *re.split(r"[/?#@:]", password)})
    return found


def _forms(secret: str) -> set[str]:
    """Return how a secret may be written."""
    raw = secret.encode(errors="surrogateescape")
    # What goes before and after changes the letters at both ends.
    encoded = {base64.b64encode(before + raw).decode()[4:-4] for before in (b"", b"a", b"aa")}
    encoded |= {base64.b64encode(raw).decode()}
    wide = secret.encode("utf-16-le", errors="surrogatepass").decode("latin-1")
    escaped = {repr(form)[1:-1] for form in (secret, wide)} | {str(raw)[2:-1], str(wide.encode("latin-1"))[2:-1]}
    return {secret, wide, quote(raw, safe=""), *escaped, *(form for form in encoded if len(form) >= 8)}
