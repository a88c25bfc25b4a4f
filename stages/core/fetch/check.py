"""The report of `fetch --check`, before anything is downloaded: whether the download would work, and its size.

Purpose: one form for all sources, filled by each source's own module and shown by one function.
Reads and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from stages.core.common.sizes import megabytes


@dataclass(frozen=True)
class Check:
    """What is known about a preset at its source.

    Attributes:
        source: as in `fetch.source`.
        preset: the preset's name and, where it has one, its handle.
        credentials: where those in use were found (never what they are); None where none were found or needed.
        user: who one is logged in as; None where that is not known or needed.
        consent: whether the license was accepted; None if the source does not require it or does not report it.
        present: whether the files are here already, unaltered.
        download_bytes: what would be downloaded; None if the source does not report it.
        free_bytes: free disk space for the files.
        notes: what the user should know besides, a line each.
        host: whom the source's questions go to; None where it asks nobody, or whom is another program's to know.
        trouble: why the fetch would not work and what to do, two lines; None where it would.
    """

    source: str
    preset: str
    credentials: str | None
    user: str | None
    consent: bool | None
    present: bool
    download_bytes: int | None
    free_bytes: int
    notes: tuple[str, ...] = ()
    host: str | None = None
    trouble: str | None = None


def show(check: Check) -> str:
    """Return what a check found as lines of name and value; texts from outside lose what could steer a terminal."""
    lines = {
        "source": check.source + (f" ({check.host})" if check.host else ""),
        "preset": check.preset,
        "credentials": check.credentials or "none in use",
        "logged in as": check.user or "not asked or not reported",
        "license": {True: "accepted", False: "not accepted", None: "not asked or not reported"}[check.consent],
        "here already": "yes" if check.present else "no",
        "download": "unknown" if check.download_bytes is None else _size(check.download_bytes),
        "free room": _size(check.free_bytes),
    } | ({"note": "; ".join(check.notes)} if check.notes else {})
    return "\n".join(f"{name:13}{_plain(value)}" for name, value in lines.items())


def obstacle(check: Check) -> str | None:
    """Return why the fetch would not work and what to do, two lines; None where it would.

    A source that only says what it found is judged by that.
    """
    if check.trouble or check.present:
        return check.trouble
    if check.consent is False:
        return (
            f"The license of {check.preset} was not accepted. Received: credentials={check.credentials or 'none'}\n"
            "Accept it on the model's page, and run this again with a token of that account (Hugging Face: HF_TOKEN)."
        )
    if check.download_bytes is not None and check.download_bytes > check.free_bytes:
        return (
            f"{_size(check.download_bytes)} are needed for {check.preset}. Received: free={_size(check.free_bytes)}\n"
            "Make room, or set GEMMA_TUNING_CACHE to a folder on a larger disk."
        )
    return None


def _size(count: int) -> str:
    """Return bytes for a user."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else megabytes(count, 1) if count >= 1e5 else f"{count:,} bytes"


def _plain(text: str) -> str:
    """Return a text without control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
