"""What `fetch --check` tells before anything is downloaded: whether the download would work, and what it would cost.

Purpose: one form for all sources, filled by each source's own module and shown by one function.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """What is known about a preset at its source.

    Attributes:
        source: as in `fetch.source`.
        preset: the preset's name and, where it has one, its handle.
        credentials: where the credentials in use were found (never what they are); None: none found, or none needed.
        user: who one is logged in as; None where that is not known or needed.
        consent: whether the licence was accepted; None where the source does not ask for it or does not tell.
        present: whether the files are here already, unaltered.
        download_bytes: what would be downloaded; None where the source does not tell.
        free_bytes: free room where the files would lie.
    """

    source: str
    preset: str
    credentials: str | None
    user: str | None
    consent: bool | None
    present: bool
    download_bytes: int | None
    free_bytes: int
