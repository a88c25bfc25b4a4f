"""A keras-hub Gemma preset from Kaggle.

Purpose: turn a name of keras-hub's registry into a model at Kaggle, have kagglehub download it, and list its files.
Reads: Kaggle, with the credentials that are found. Writes: kagglehub's own cache folder, and in our cache folder
`presets/<key>`, a link to it, and `presets/<key>.json`, the files as they were when they came.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, replace
from pathlib import Path

from stages.core.common.errors import StageError
from stages.core.common.sizes import megabytes
from stages.core.fetch.catalog import HANDLE, kaggle_handle, license_of
from stages.core.fetch.check import Check
from stages.core.fetch.disk import check_room, explain_unwritten, free_bytes, no_room, not_writable, one_at_a_time
from stages.core.fetch.kaggle_client import MAKE_ROOM, OTHER_PLACE, KaggleModel, KaggleRefused, is_wanted
from stages.core.fetch.kaggle_credentials import ask_for_token, import_kagglehub, kaggle_credentials, kaggle_host
from stages.core.fetch.local import check_contents, check_keras_folder, list_files
from stages.core.files import read_json, write_json
from stages.core.presets.manifest import fault
from stages.core.records.manifest import Manifest, PresetFile

logger = logging.getLogger(__name__)

CONFIG = "config.json"
WEIGHTS = "the weights of "


def fetch_kaggle(preset: str, cache: Path) -> Manifest:
    """Bring a preset from Kaggle into the cache folder and describe it; without a network if it is there unaltered.

    Args:
        preset: a name of keras-hub's registry, or `kaggle://<owner>/<model>/keras/<variation>/<version>`.
        cache: the cache folder.

    Raises:
        ParamsError: no such preset.
        StageError: no credentials, no consent, no network, no room.
    """
    handle, _ = kaggle_handle(preset)
    model, key = _model_and_key(handle)
    link, record = cache / "presets" / key, cache / "presets" / f"{key}.json"
    files = _whole(link, record)
    if files is None:
        with one_at_a_time(link):
            # Another clone may have brought them while this one waited.
            files = _whole(link, record) or _fetch(model, link, record)
    return Manifest(
        preset=preset,
        source="kaggle",
        format="keras",
        handle=handle,
        folder=f"presets/{key}",
        license=license_of(preset),
        files=files,
    )


def check_kaggle(preset: str, cache: Path) -> Check:
    """Tell whether `fetch_kaggle` would work and what it would download; asks Kaggle nothing if the files are here.

    Args:
        preset: as for `fetch_kaggle`.
        cache: the cache folder.

    Raises:
        ParamsError: no such preset.
    """
    handle, _ = kaggle_handle(preset)
    model, key = _model_and_key(handle)
    link, record = cache / "presets" / key, cache / "presets" / f"{key}.json"
    place = Path(import_kagglehub().config.get_cache_folder())
    files = _recorded(record)
    damaged = {file.name: file.size for file in files or () if fault(link, file)}
    present = files is not None and not damaged
    check = Check(
        source="kaggle",
        preset=handle if preset == handle else f"{preset} ({handle})",
        credentials=None,
        user=None,
        consent=None,
        present=present,
        download_bytes=0 if present else sum(damaged.values()) or None,
        free_bytes=free_bytes(place),
        host=kaggle_host(),
    )
    notes: list[str] = []
    try:
        credentials = kaggle_credentials()
        notes += credentials.notes
        check = replace(check, credentials=credentials.source, notes=credentials.notes)
        if present:
            return check
        kaggle = KaggleModel(model, credentials)
        if files is None and kaggle.here() is not None:
            return replace(check, download_bytes=0)
        sizes = damaged or kaggle.files()
        needed = sum(damaged.values()) or kaggle.missing_bytes(sizes)
        check = replace(check, user=kaggle.user(), download_bytes=needed)
        kaggle.ask_leave(min(sizes, key=sizes.__getitem__, default=CONFIG))
        consent = True if credentials.source else None
        trouble = (
            no_room(place, needed, WEIGHTS + model, MAKE_ROOM)
            or not_writable(place, OTHER_PLACE)
            or not_writable(cache)
        )
    except StageError as error:
        refused = isinstance(error, KaggleRefused) and error.status == 403 and check.credentials is not None
        consent, trouble = (False if refused else None), str(error)
        if present:
            # No credentials are needed for what is here, but one who asks may want to know.
            notes, trouble = [str(error).splitlines()[0]], None
    return replace(check, consent=consent, notes=tuple(notes), trouble=trouble)


def _model_and_key(handle: str) -> tuple[str, str]:
    """Return a handle as kagglehub writes it, and the preset's name in the cache folder.

    The name is the whole handle: presets of different owners share variations and versions. No part of a handle can
    hold the plus sign, so no two handles share a name.
    """
    match = HANDLE.fullmatch(handle)
    if match is None:
        raise ValueError(f"handle must be one of Kaggle's. Received: handle={handle}")
    model = match["model"]
    return model, "kaggle+" + model.replace("/", "+")


def _whole(link: Path, record: Path) -> tuple[PresetFile, ...] | None:
    """Return the files if all of them are here as they came, else None."""
    files = _recorded(record)
    return None if files is None or any(fault(link, file) for file in files) else files


def _fetch(model: str, link: Path, record: Path) -> tuple[PresetFile, ...]:
    """Restore the files, with the credentials that are found; at a terminal with those that the user types."""
    credentials = kaggle_credentials()
    for note in credentials.notes:
        logger.info(note)
    try:
        return _restore(KaggleModel(model, credentials), link, record)
    except KaggleRefused as error:
        if error.status not in (401, 403) or credentials.source is not None:
            raise
        typed = ask_for_token()
        if typed is None:
            raise
        return _restore(KaggleModel(model, typed), link, record)


def _restore(kaggle: KaggleModel, link: Path, record: Path) -> tuple[PresetFile, ...]:
    """Download what is missing or altered, point the link to it, and return the files.

    Args:
        kaggle: the model.
        link: the link to make.
        record: the list of files as they were when they came, made if it is not there.
    """
    logger.info(f"Downloading {kaggle.handle} from Kaggle, as far as it is not here.")
    files = _recorded(record)
    folder = _bring_all(kaggle) if files is None else _bring_again(kaggle, files, record)
    _refuse_strangers(folder)
    check_keras_folder(folder)
    check_contents(folder, "keras")
    try:
        _point(link, folder)
        if files is None:
            names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            files = list_files(folder, filter(is_wanted, names))
            write_json(record, [asdict(file) for file in files])
    except OSError as error:
        raise StageError(explain_unwritten(error, link.parent)) from error
    return files


def _bring_all(kaggle: KaggleModel) -> Path:
    """Return the folder with all files of a model, downloaded as far as kagglehub does not hold them."""
    if (folder := kaggle.here()) is not None:
        return folder
    sizes = kaggle.files()
    if not sizes:
        raise StageError(
            f"{kaggle.handle} must hold the files of a keras-hub preset. Received: none of that kind\n"
            f"See {kaggle.page}."
        )
    # kagglehub writes through a link that is there already.
    _refuse_strangers(kaggle.folder)
    check_room(kaggle.folder, kaggle.missing_bytes(sizes), WEIGHTS + kaggle.handle, MAKE_ROOM)
    for name, size in sizes.items():
        # kagglehub's bars have no names.
        logger.info(f"{name}: {megabytes(size, 1)}")
        whole = kaggle.download(name).parents[name.count("/")]
    return whole


def _bring_again(kaggle: KaggleModel, files: tuple[PresetFile, ...], record: Path) -> Path:
    """Return the folder with the files as they were when they came first, downloaded where they are not."""
    for file in files:
        folder = kaggle.download(file.name).parents[file.name.count("/")]
        if fault(folder, file):
            # kagglehub takes any file that it once had whole for whole.
            (folder / file.name).unlink(missing_ok=True)
            kaggle.download(file.name)
            if found := fault(folder, file):
                raise StageError(
                    f"{file.name} of {kaggle.handle} came from Kaggle with other bytes than the first time: {found}\n"
                    f"Delete {record} if you want to accept them, and run `python -m stages.fetch` again."
                )
    return folder


def _refuse_strangers(folder: Path) -> None:
    """Refuse a folder that holds links out of it, or what is neither file nor folder.

    kagglehub may have unpacked an archive there for another program.
    """
    home = folder.resolve()
    for path in home.rglob("*"):
        if not path.resolve().is_relative_to(home) or not (path.is_file() or path.is_dir()):
            raise StageError(
                f"A preset's folder must hold files only, and no link out of it. Received: {path}\n"
                f"Delete {folder} and run `python -m stages.fetch` again."
            )


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
