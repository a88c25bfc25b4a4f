"""A keras-hub Gemma preset from Kaggle.

Purpose: turn a name of keras-hub's registry into a model at Kaggle, have kagglehub download it, and list its files.
Reads: Kaggle, with the credentials that kagglehub finds. Writes: kagglehub's own cache folder, and in our cache folder
`presets/<key>`, a link to it, and `presets/<key>.json`, the files as they were when they came.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

from stages.core.downloads import check_room, one_at_a_time
from stages.core.errors import StageError
from stages.core.files import read_json, write_json
from stages.core.keras_folder import check_keras_folder, list_files
from stages.core.presets import Manifest, PresetFile, fault
from stages.core.registry import HANDLE, kaggle_handle, licence_of

BYTES_PER_PARAMETER = 2  # bfloat16, the smallest dtype that keras-hub's presets are kept in


def fetch_kaggle(preset: str, cache: Path, say: Callable[[str], None]) -> Manifest:
    """Bring a preset from Kaggle into the cache folder and describe it; without a network if it is there unaltered.

    Args:
        preset: a name of keras-hub's registry, or `kaggle://<owner>/<model>/keras/<variation>/<version>`.
        cache: the cache folder.
        say: prints one line for the person.

    Raises:
        ParamsError: no such preset.
        StageError: no credentials, no consent, no network, no room.
    """
    handle, parameters = kaggle_handle(preset)
    match = HANDLE.fullmatch(handle)
    key = f"{match['variation']}-kaggle-{match['version']}"
    link, record = cache / "presets" / key, cache / "presets" / f"{key}.json"
    files = _recorded(record)
    if files is None or any(fault(link, file) for file in files):
        with one_at_a_time(link, say):
            files = _restore(match["model"], link, record, parameters * BYTES_PER_PARAMETER, say)
    return Manifest(preset, "kaggle", "keras", handle, f"presets/{key}", licence_of(preset), files)


def _restore(model: str, link: Path, record: Path, size: int, say: Callable[[str], None]) -> tuple[PresetFile, ...]:
    """Download what is missing or altered, point the link to it, and return the files.

    Args:
        model: the handle as kagglehub writes it: owner/model/framework/variation/version.
        link: the link to make.
        record: the list of files as they were when they came, made if it is not there.
        size: bytes to expect at the least, for the check of the disk.
        say: prints one line for the person.
    """
    if not link.exists():
        check_room(Path(_kagglehub().config.get_cache_folder()), size, f"the weights of {model}")
    say(f"Downloading {model} from Kaggle, as far as it is not here.")
    folder = _download(model)
    files = _recorded(record)
    for file in files or ():
        if fault(folder, file):
            # kagglehub takes a file of the right size for whole.
            (folder / file.name).unlink(missing_ok=True)
            _download(model, file.name)
            if found := fault(folder, file):
                raise StageError(
                    f"{file.name} of {model} came from Kaggle with other bytes than the first time: {found}\n"
                    f"Delete {record} if you want to accept them, and run `python -m stages.fetch` again."
                )
    check_keras_folder(folder)
    _point(link, folder)
    if files is None:
        files = list_files(folder)
        write_json(record, [asdict(file) for file in files])
    return files


def _recorded(record: Path) -> tuple[PresetFile, ...] | None:
    """Return the files as they were when they came from Kaggle, or None if that is not known."""
    try:
        return tuple(PresetFile(**file) for file in read_json(record))
    except (OSError, ValueError, TypeError):
        return None


def _point(link: Path, folder: Path) -> None:
    """Make `link` a symbolic link to kagglehub's folder, replacing an older link in one step."""
    if link.exists() and not link.is_symlink():
        raise StageError(f"{link} must be a link to kagglehub's folder, and is none.\nMove it away and run this again.")
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.resolve(), target_is_directory=True)
    fresh.replace(link)


def _kagglehub() -> ModuleType:
    """Import kagglehub so that it keeps standard output clean, and its bars for a terminal.

    It and tqdm read both settings when they are first imported.
    """
    os.environ.setdefault("KAGGLEHUB_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    import kagglehub
    import kagglehub.config
    import kagglehub.exceptions

    return kagglehub


def _download(model: str, name: str | None = None) -> Path:
    """Have kagglehub download a model, as far as it does not hold it, and return the folder.

    Args:
        model: the handle as kagglehub writes it.
        name: one file of it, downloaded in any case; then its path is returned.

    Raises:
        StageError: as Kaggle or the network answered.
    """
    kagglehub = _kagglehub()
    import requests

    try:
        with contextlib.redirect_stdout(sys.stderr):
            return Path(kagglehub.model_download(model, name, force_download=name is not None))
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        raise StageError(_explain_status(status, model)) from error
    except (requests.RequestException, ConnectionError, kagglehub.exceptions.DataCorruptionError) as error:
        raise StageError(
            f"The download of {model} from Kaggle did not end well. Received: {_short(error)}\n"
            "Check the network and run `python -m stages.fetch` again; it goes on where it broke off."
        ) from error
    except OSError as error:
        raise StageError(
            f"The download of {model} from Kaggle could not be written. Received: {error.strerror}: {error.filename}\n"
            "Make room or mend the folder's rights, or set KAGGLEHUB_CACHE to another folder."
        ) from error
    except ValueError as error:
        raise StageError(
            f"kagglehub could not use its settings for {model}. Received: {_short(error)}\n"
            "Make a new API token in your settings at Kaggle and store it as Kaggle says."
        ) from error


def _explain_status(status: int, model: str) -> str:
    """Return two lines for an HTTP status that Kaggle answered with."""
    page = "https://www.kaggle.com/models/" + "/".join(model.split("/")[:2])
    if status in (401, 403) and _kagglehub().config.get_kaggle_credentials() is None:
        return (
            f"Kaggle answered {status} for {model}: it wants an account that accepted the licence, and no credentials "
            f"were found.\nAccept it at {page}, make an API token in your Kaggle settings, and set KAGGLE_API_TOKEN."
        )
    if status == 401:
        return (
            f"Kaggle answered 401 for {model}: it does not accept your credentials.\n"
            "Make a new API token in your Kaggle settings, and set KAGGLE_API_TOKEN."
        )
    if status == 403:
        return (
            f"Kaggle answered 403 for {model}: your account has not accepted the licence.\n"
            f"Accept it at {page} and run this again."
        )
    if status == 404:
        return (
            f"Kaggle answered 404: it has no model {model}.\n"
            f"See {page} for its variations and versions, and set fetch.preset."
        )
    return f"Kaggle answered {status} for {model}.\nRun `python -m stages.fetch` again later."


def _short(error: Exception) -> str:
    """Return an error's text on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
