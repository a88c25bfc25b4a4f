"""A Gemma from Hugging Face: a keras-hub preset (hf://keras/gemma3_1b) or a plain checkpoint
(hf://google/gemma-3-1b-pt).

Purpose: resolve a handle to one commit, have huggingface_hub download the files that are needed, verify each of them,
and pin them. No pickle and no program is ever among them. Once they are here, no network is asked.
Reads: the Hub, with the token that huggingface_hub finds. Writes, below our cache folder's `presets/`: the preset's
folder `<owner>--<model>-huggingface-<commit>`, next to it a .json with what was found, and one with the commit that a
revision stood for.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from stages.core.common.errors import ParamsError, StageError
from stages.core.common.redaction import host_of
from stages.core.common.sizes import megabytes
from stages.core.fetch.catalog import HEALTH, REGISTRY, name_of
from stages.core.fetch.check import Check
from stages.core.fetch.disk import check_room, free_bytes, one_at_a_time
from stages.core.fetch.hub import (
    Source,
    asked,
    credentials_source,
    endpoint,
    explained,
    hub_client,
    hub_name,
    source_of,
)
from stages.core.fetch.hub_files import (
    CONFIG,
    WEIGHTS,
    check_headers,
    checked_architecture,
    differs,
    download,
    needed_files,
    refuse_other_models,
    sha256_of,
)
from stages.core.fetch.local import check_contents, folder_format
from stages.core.files import read_json, write_json
from stages.core.presets.architecture import Architecture
from stages.core.presets.manifest import LICENSE, fault
from stages.core.records.manifest import License, Manifest, PresetFile

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

logger = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch_huggingface(preset: str, cache: Path) -> Manifest:
    """Bring a preset from Hugging Face into the cache folder and describe it; with no network if it is there unaltered.

    A branch or tag (`main`, if none is named) is pinned to the commit of its first fetch.

    Args:
        preset: `hf://owner/model`, with `@branch`, `@tag` or `@commit` if wanted.
        cache: the cache folder.

    Raises:
        ParamsError: not such a handle, or not a text Gemma.
        StageError: no consent, no network, no room, other bytes than those announced: two lines each.
    """
    source = source_of(preset)
    found = _present(source, preset, cache)
    if found is None:
        with one_at_a_time(source.base(cache)):
            try:
                found = _present(source, preset, cache) or _restore(source, preset, cache)
            except ParamsError:
                # A commit that cannot be used must not block one that mends it.
                _reference(source, cache).unlink(missing_ok=True)
                raise
    return found


def check_huggingface(preset: str, cache: Path) -> Check:
    """Tell whether a preset could be fetched, and what it would cost; of its weights only the headers are downloaded.

    Raises:
        ParamsError: not a handle of a text Gemma.
        StageError: the Hub does not answer, does not know the model, or does not accept the token.
    """
    source = source_of(preset)
    present = _present(source, preset, cache) is not None
    credentials, user, consent, size, handle = credentials_source(), None, None, 0, preset
    try:
        with explained(source):
            api = hub_client()
            if credentials:
                user = asked(api.whoami)["name"]
            info = _information(api, source, cache)
            handle = f"hf://{source.repo}@{info.sha}"
            if info.gated:
                consent = _has_consented(api, source)
            refuse_other_models(source, info.config)
            needed, folder = needed_files(source, info), source.folder(cache, str(info.sha))
            missing = [each for each in needed if not present and differs(folder, each)]
            size = sum(each.size or 0 for each in missing)
            if missing and consent is not False:
                with tempfile.TemporaryDirectory() as aside:
                    check_headers(source, str(info.sha), needed, Path(aside))
    except StageError as error:
        # What is here needs no Hub.
        if not present or isinstance(error, ParamsError):
            raise
    return Check(
        "huggingface", handle, credentials, user, consent, present, size, free_bytes(cache), host=host_of(endpoint())
    )


def architecture(preset: str, cache: Path) -> Architecture:
    """Return a preset's class and arguments; of its files only `config.json` is fetched, if it is not here.

    Raises:
        ParamsError, StageError: as `fetch_huggingface`.
    """
    source = source_of(preset)
    commit = _commit(source, cache)
    if commit is None or not _has_configuration(source, cache, commit):
        with one_at_a_time(source.base(cache)), explained(source):
            info = _information(hub_client(), source, cache)
            commit = str(info.sha)
            folder = source.folder(cache, commit)
            refuse_other_models(source, info.config)
            download(
                source, commit, next(each for each in needed_files(source, info) if each.rfilename == CONFIG), folder
            )
            shutil.rmtree(folder / ".cache", ignore_errors=True)
            _remember(source, cache, commit)
    return checked_architecture(source, source.folder(cache, commit))


def _has_configuration(source: Source, cache: Path, commit: str) -> bool:
    """Return whether the configuration is here, and as it came if that is known."""
    folder, record = source.folder(cache, commit), _recorded(source, cache, commit)
    if record is None:
        return (folder / CONFIG).is_file()
    return not any(fault(folder, file) for file in record["files"] if file.name == CONFIG)


def _present(source: Source, preset: str, cache: Path) -> Manifest | None:
    """Return the manifest of what is here, whole and unaltered; None if it is not."""
    commit = _commit(source, cache)
    record = _recorded(source, cache, commit) if commit else None
    if record is None or any(fault(source.folder(cache, str(commit)), file) for file in record["files"]):
        return None
    return _manifest(source, preset, cache, str(commit), record)


def _manifest(source: Source, preset: str, cache: Path, commit: str, record: dict[str, Any]) -> Manifest:
    """Return the manifest of a commit's files."""
    folder = source.folder(cache, commit).relative_to(cache).as_posix()
    handle = f"hf://{source.repo}@{commit}"
    return Manifest(preset=preset, source="huggingface", handle=handle, folder=folder, **record)


def _commit(source: Source, cache: Path) -> str | None:
    """Return the commit that the revision is pinned to, if that is known here."""
    if COMMIT.fullmatch(source.revision):
        return source.revision
    try:
        commit = read_json(_reference(source, cache))["commit"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return commit if isinstance(commit, str) and COMMIT.fullmatch(commit) else None


def _reference(source: Source, cache: Path) -> Path:
    """Return the file that keeps what a branch or tag stood for."""
    base = source.base(cache)
    return base.with_name(f"{base.name}@{quote(source.revision, safe='')}.json")


def _remember(source: Source, cache: Path, commit: str) -> None:
    """Keep what a branch or tag stood for."""
    if not COMMIT.fullmatch(source.revision):
        write_json(_reference(source, cache), {"commit": commit})


def _record(source: Source, cache: Path, commit: str) -> Path:
    """Return the file that keeps what was found at a commit."""
    folder = source.folder(cache, commit)
    return folder.with_name(f"{folder.name}.json")


def _recorded(source: Source, cache: Path, commit: str) -> dict[str, Any] | None:
    """Return format, license and files as they came, or None if that is not known."""
    try:
        content = read_json(_record(source, cache, commit))
        files = tuple(PresetFile(**file) for file in content["files"])
        return {"format": content["format"], "license": License(**content["license"]), "files": files}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _restore(source: Source, preset: str, cache: Path) -> Manifest:
    """Download what is missing or altered, verify it, and write down what was found."""
    with explained(source):
        info = _information(hub_client(), source, cache)
        commit = str(info.sha)
        folder = source.folder(cache, commit)
        refuse_other_models(source, info.config)
        needed = sorted(needed_files(source, info), key=lambda each: each.rfilename)
        # What a killed run left of a file is of no use to another.
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        missing = [each for each in needed if differs(folder, each)]
        size = sum(each.size or 0 for each in missing)
        check_room(folder, size, f"the files of {source.repo}")
        logger.info(f"Downloading {source.repo} from {hub_name()}: {megabytes(size)} in {len(missing)} files.")
        if any(WEIGHTS.fullmatch(each.rfilename) for each in missing):
            check_headers(source, commit, needed, folder)
        for each in missing:
            if differs(folder, each):
                download(source, commit, each, folder)
        shutil.rmtree(folder / ".cache", ignore_errors=True)
    try:
        file_format = folder_format(folder)
        check_contents(folder, file_format)
    except ParamsError as error:
        raise ParamsError(
            f"{source.repo} is no whole preset of a text Gemma. Received: fetch.preset={preset}\n{error}"
        ) from error
    files = tuple(PresetFile(each.rfilename, each.size or 0, sha256_of(folder, each)) for each in needed)
    before = {file.name: file.sha256 for file in (_recorded(source, cache, commit) or {}).get("files", ())}
    if changed := [file.name for file in files if before.get(file.name, file.sha256) != file.sha256]:
        raise StageError(
            f"{changed[0]} of {source.repo} came from {hub_name()} with other bytes than the first time, under the "
            f"same commit. Received: fetch.preset={preset}\n"
            f"Delete {_record(source, cache, commit)} if you want to accept them, and run this again."
        )
    record: dict[str, Any] = {"format": file_format, "license": _license(source, info), "files": files}
    as_json = {"license": asdict(record["license"]), "files": [asdict(file) for file in files]}
    write_json(_record(source, cache, commit), record | as_json)
    _remember(source, cache, commit)
    return _manifest(source, preset, cache, commit, record)


def _information(api: HfApi, source: Source, cache: Path) -> ModelInfo:
    """Ask the Hub what it has at the revision: commit, files with sizes and hashes, license, gate."""
    revision = _commit(source, cache) or source.revision
    return asked(lambda: api.model_info(source.repo, revision=revision, files_metadata=True))


def _has_consented(api: HfApi, source: Source) -> bool:
    """Return whether the account may download from a gated repository."""
    from huggingface_hub.errors import GatedRepoError

    try:
        asked(lambda: api.auth_check(source.repo))
    except GatedRepoError:
        return False
    return True


def _license(source: Source, info: ModelInfo) -> License:
    """Return the terms that the model's card states."""
    card = info.card_data.to_dict() if info.card_data else {}
    stated, name, link = card.get("license"), card.get("license_name"), card.get("license_link")
    if stated == "gemma":
        return LICENSE
    if name == "health-ai-developer-foundations":
        return HEALTH
    if (preset := name_of(f"hf://{source.repo}")) in REGISTRY:
        return REGISTRY[preset].license
    named = name if stated == "other" and name else stated
    if not isinstance(named, str) or named == "other":
        return License("terms on the model's page", source.page)
    return License(named, link if isinstance(link, str) and link.startswith("https://") else source.page)
