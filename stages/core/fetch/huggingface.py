"""A Gemma from Hugging Face: a keras-hub preset (hf://keras/gemma3_1b) or a plain checkpoint
(hf://google/gemma-3-1b-pt).

Purpose: resolve a handle to one commit, have huggingface_hub download the files that are needed, verify each of them,
and pin them. No pickle and no program is ever among them. Once they are here, no network is asked.
Reads: the Hub, with the token that huggingface_hub finds. Writes, below our cache folder's `presets/`: the preset's
folder `<owner>--<model>-huggingface-<commit>`, beside it a .json with what was found, and one with the commit that a
revision stood for.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from stages.core.common.errors import ParamsError, StageError, shown
from stages.core.common.redaction import (
    brief,
    host_of,
)
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
    import_hub,
    source_of,
)
from stages.core.fetch.local import check_contents, check_vocabulary, folder_format, other_kind
from stages.core.files import read_json, write_json
from stages.core.presets import keras_h5, safetensors
from stages.core.presets.architecture import Architecture, read_architecture
from stages.core.presets.manifest import LICENCE, fault, sha256_with_progress
from stages.core.presets.tokenizer import HUGGING_FACE_VOCABULARY, JSON_VOCABULARY
from stages.core.presets.untrusted import read_object
from stages.core.records.manifest import Licence, Manifest, PresetFile

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

logger = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIG = "config.json"  # both kinds of preset call their configuration so
# The files of a preset, by kind; all others (pickles, programs, other formats, pictures) stay where they are.
KERAS_FILES = re.compile(
    r"config\.json|metadata\.json|tokenizer\.json|preprocessor\.json|assets/tokenizer/vocabulary\.spm"
    r"|model\.weights\.(h5|json)|model_\d+\.weights\.h5"
)
PLAIN_FILES = re.compile(r"config\.json|tokenizer\.(model|json)|added_tokens\.json|model\.safetensors(\.index\.json)?")
PLAIN_SHARDS = re.compile(r"model-\d+-of-\d+\.safetensors")
INDEXES = {keras_h5.INDEX, safetensors.INDEX}
WEIGHTS = re.compile(r".*\.(h5|safetensors)")
FIRST_READ = 1 << 17  # bytes; the headers of most files fit into so many, and are had with one question


def fetch_huggingface(preset: str, cache: Path) -> Manifest:
    """Bring a preset from Hugging Face into the cache folder and describe it; with no network if it is there unaltered.

    A branch or tag (`main`, if none is named) stands for the commit that it was at the first fetch.

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
                # A commit that was no use must not stand in the way of one that mends it.
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
            _refuse_other_models(source, info.config)
            needed, folder = _needed(source, info), source.folder(cache, str(info.sha))
            missing = [each for each in needed if not present and _differs(folder, each)]
            size = sum(each.size or 0 for each in missing)
            if missing and consent is not False:
                with tempfile.TemporaryDirectory() as aside:
                    _inspect(source, str(info.sha), needed, Path(aside))
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
            _refuse_other_models(source, info.config)
            _download(source, commit, next(each for each in _needed(source, info) if each.rfilename == CONFIG), folder)
            shutil.rmtree(folder / ".cache", ignore_errors=True)
            _remember(source, cache, commit)
    return _checked_architecture(source, source.folder(cache, commit))


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
    """Return the commit that the revision stands for, if that is known here."""
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
    """Return format, licence and files as they came, or None if that is not known."""
    try:
        content = read_json(_record(source, cache, commit))
        files = tuple(PresetFile(**file) for file in content["files"])
        return {"format": content["format"], "licence": Licence(**content["licence"]), "files": files}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _restore(source: Source, preset: str, cache: Path) -> Manifest:
    """Download what is missing or altered, verify it, and write down what was found."""
    with explained(source):
        info = _information(hub_client(), source, cache)
        commit = str(info.sha)
        folder = source.folder(cache, commit)
        _refuse_other_models(source, info.config)
        needed = sorted(_needed(source, info), key=lambda each: each.rfilename)
        # What a killed run left of a file is of no use to another.
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        missing = [each for each in needed if _differs(folder, each)]
        check_room(folder, sum(each.size or 0 for each in missing), f"the files of {source.repo}")
        megabytes = sum(each.size or 0 for each in missing) / 1e6
        logger.info(f"Downloading {source.repo} from {hub_name()}: {megabytes:,.0f} MB in {len(missing)} files.")
        if any(WEIGHTS.fullmatch(each.rfilename) for each in missing):
            _inspect(source, commit, needed, folder)
        for each in missing:
            if _differs(folder, each):
                _download(source, commit, each, folder)
        shutil.rmtree(folder / ".cache", ignore_errors=True)
    try:
        file_format = folder_format(folder)
        check_contents(folder, file_format)
    except ParamsError as error:
        raise ParamsError(
            f"{source.repo} is no whole preset of a text Gemma. Received: fetch.preset={preset}\n{error}"
        ) from error
    files = tuple(PresetFile(each.rfilename, each.size or 0, _sha256(folder, each)) for each in needed)
    before = {file.name: file.sha256 for file in (_recorded(source, cache, commit) or {}).get("files", ())}
    if changed := [file.name for file in files if before.get(file.name, file.sha256) != file.sha256]:
        raise StageError(
            f"{changed[0]} of {source.repo} came from {hub_name()} with other bytes than the first time, under the "
            f"same commit. Received: fetch.preset={preset}\n"
            f"Delete {_record(source, cache, commit)} if you want to accept them, and run this again."
        )
    record: dict[str, Any] = {"format": file_format, "licence": _licence(source, info), "files": files}
    as_json = {"licence": asdict(record["licence"]), "files": [asdict(file) for file in files]}
    write_json(_record(source, cache, commit), record | as_json)
    _remember(source, cache, commit)
    return _manifest(source, preset, cache, commit, record)


def _inspect(source: Source, commit: str, needed: list[RepoSibling], folder: Path) -> None:
    """Bring the small files of a preset, and check whether the weights are worth having, by their headers.

    What is checked: every key of the configuration, every file that an index names, name, shape and dtype of every
    tensor of a plain checkpoint, and that the vocabulary has the size of the table. The headers of keras-hub's HDF5
    files are spread over them, so that these are checked when they are here.

    Raises:
        ParamsError: the preset could not be used; says why.
    """
    files = {each.rfilename: each for each in needed}

    def bring(name: str) -> None:
        if _differs(folder, files[name]):
            _download(source, commit, files[name], folder)

    bring(CONFIG)
    architecture = _checked_architecture(source, folder)
    plain = any(name.endswith(".safetensors") for name in files)
    try:
        weights: tuple[str, ...] = (safetensors.SINGLE,) if plain else ()
        for name in INDEXES & files.keys():
            bring(name)
            weights = safetensors.shards_of(read_object(folder / name), folder / name)
            if absent := [shard for shard in weights if shard not in files]:
                raise ParamsError(
                    f"{source.repo} must hold every file that {name} names. Missing: {shown(absent[0])}\n"
                    f"See {source.page}/tree/{source.revision}."
                )
        if plain:
            stored: dict[str, safetensors.Stored] = {}
            for name in weights:
                for tensor, entry in _header(source, commit, files[name]).items():
                    if tensor in stored:
                        raise safetensors.twice(tensor, name, stored[tensor].file)
                    stored[tensor] = entry
            safetensors.check_tensors(folder, stored)
        for name in files:
            if not WEIGHTS.fullmatch(name):
                bring(name)
        check_vocabulary(folder, "safetensors" if plain else "keras", architecture)
    except ParamsError:
        raise
    except StageError as error:
        # The folder is none of the person's.
        raise ParamsError(f"{source.repo} cannot be used. {str(error).replace(str(folder), source.repo)}") from error


def _header(source: Source, commit: str, file: RepoSibling) -> dict[str, safetensors.Stored]:
    """Return the tensors of a safetensors file at the Hub; no more than its beginning is read.

    Raises:
        StageError: it has no header that can be read.
    """
    name = file.rfilename
    start = asked(lambda: _beginning(source, commit, name, FIRST_READ))
    if len(start) < (end := safetensors.header_end(start, name)):
        start = asked(lambda: _beginning(source, commit, name, end))
    return safetensors.read_header(start, name, file.size)


def _beginning(source: Source, commit: str, name: str, count: int) -> bytes:
    """Return the first bytes of a file at the Hub, fewer if it has no more; a server may send all, and is not heard."""
    hub = import_hub()
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    address = hub.hf_hub_url(source.repo, name, revision=commit)
    headers = {**build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    content = bytearray()
    with get_session().stream("GET", address, headers=headers) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        for block in response.iter_bytes():
            content += block
            if len(content) >= count:
                break
    return bytes(content[:count])


def _information(api: HfApi, source: Source, cache: Path) -> ModelInfo:
    """Ask the Hub what it has at the revision: commit, files with sizes and hashes, licence, gate."""
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


def _needed(source: Source, info: ModelInfo) -> list[RepoSibling]:
    """Return the files of a repository that make the preset.

    Raises:
        ParamsError: it has no configuration or no weights that could be read.
    """
    names = {each.rfilename for each in info.siblings or ()}
    if other := other_kind(names):
        raise ParamsError(f"{source.repo} must be a preset. Received: {other[0]}\n{other[1]}")
    if CONFIG in names and names & {"model.weights.h5", "model.weights.json"}:
        wanted = [name for name in names if KERAS_FILES.fullmatch(name)]
    elif CONFIG in names and names & {"model.safetensors", "model.safetensors.index.json"}:
        wanted = [name for name in names if PLAIN_FILES.fullmatch(name)]
        if safetensors.SINGLE in names:
            wanted = [name for name in wanted if name != safetensors.INDEX]
        else:
            wanted += [name for name in names if PLAIN_SHARDS.fullmatch(name)]
        if not names & {HUGGING_FACE_VOCABULARY, JSON_VOCABULARY}:
            raise ParamsError(
                f"{source.repo} must hold {HUGGING_FACE_VOCABULARY}, the SentencePiece vocabulary, or "
                f"{JSON_VOCABULARY}. Received: neither\nSee {source.page}/tree/{source.revision}."
            )
    else:
        raise ParamsError(
            f"{source.repo} must hold config.json with model.weights.h5 (keras-hub) or model.safetensors, whole or in "
            f"parts. Received: {', '.join(sorted(names)[:6]) or 'nothing'}\nSee {source.page}/tree/{source.revision}."
        )
    return [each for each in info.siblings or () if each.rfilename in wanted]


def _refuse_other_models(source: Source, config: dict[str, Any] | None) -> None:
    """Stop before anything is downloaded where the Hub knows that the model is another.

    Raises:
        ParamsError: not a text Gemma.
    """
    from stages.core.presets.hf_config import MODEL_TYPES

    kind = (config or {}).get("model_type")
    if isinstance(kind, str) and kind not in MODEL_TYPES:
        raise ParamsError(
            f"{source.repo} is not a text Gemma ({', '.join(MODEL_TYPES)}). Received: model_type={kind}\n"
            "Choose a text model of Gemma 1, 2 or 3, such as hf://google/gemma-3-1b-pt."
        )


def _checked_architecture(source: Source, folder: Path) -> Architecture:
    """Return the architecture that the configuration states.

    Raises:
        ParamsError: it is not a text Gemma's; tells why.
    """
    try:
        content = read_json(folder / CONFIG)
        return read_architecture(folder, "safetensors" if "model_type" in content else "keras")
    except (StageError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ParamsError(
            f"{source.repo} is not a text Gemma that this project runs. Received: {brief(error)}\n"
            "Choose a text model of Gemma 1, 2 or 3, such as hf://google/gemma-3-1b-pt."
        ) from error


def _download(source: Source, commit: str, file: RepoSibling, folder: Path) -> None:
    """Have huggingface_hub bring one file, and verify it; a copy of other bytes is fetched anew once.

    Raises:
        StageError: the bytes are not those that the Hub announces.
    """
    path = folder / file.rfilename
    difference: str | None = None
    for attempt in (1, 2):
        # The client takes a file that is there for the right one, and its own cache's copy unless it is forced.
        path.unlink(missing_ok=True)
        asked(
            functools.partial(
                import_hub().hf_hub_download,
                source.repo,
                file.rfilename,
                revision=commit,
                local_dir=folder,
                force_download=attempt == 2,
            )
        )
        difference = _differs(folder, file)
        if difference is None:
            return
    path.unlink(missing_ok=True)
    raise StageError(
        f"{file.rfilename} of {source.repo} came from {hub_name()} with other bytes than announced: {difference}\n"
        "Nothing of it was kept. Run `python -m stages.fetch` again; if it stays so, a proxy may alter downloads."
    )


def _differs(folder: Path, file: RepoSibling) -> str | None:
    """Return how a file differs from what the Hub says of it, as "expected ... Received: ...", or None."""
    if file.lfs is not None:
        return fault(folder, PresetFile(file.rfilename, file.lfs.size, file.lfs.sha256))
    path = folder / file.rfilename
    if not path.is_file():
        return "expected a file. Received: no such file"
    content = path.read_bytes()
    # Small files lie in git itself, which names a file by the SHA-1 of a header and its bytes.
    digest = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return None if digest == file.blob_id else f"expected git object {file.blob_id}. Received: {digest}"


def _sha256(folder: Path, file: RepoSibling) -> str:
    """Return the SHA-256 of a verified file."""
    return file.lfs.sha256 if file.lfs is not None else sha256_with_progress(folder / file.rfilename)


def _licence(source: Source, info: ModelInfo) -> Licence:
    """Return the terms that the model's card states."""
    card = info.card_data.to_dict() if info.card_data else {}
    stated, name, link = card.get("license"), card.get("license_name"), card.get("license_link")
    if stated == "gemma":
        return LICENCE
    if name == "health-ai-developer-foundations":
        return HEALTH
    if (preset := name_of(f"hf://{source.repo}")) in REGISTRY:
        return REGISTRY[preset].licence
    named = name if stated == "other" and name else stated
    if not isinstance(named, str) or named == "other":
        return Licence("terms on the model's page", source.page)
    return Licence(named, link if isinstance(link, str) and link.startswith("https://") else source.page)
