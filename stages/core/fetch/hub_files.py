"""The files of a preset at Hugging Face: which of a repository's are needed, their check by headers, their download.

Purpose: what would be refused once it is here is refused before its weights are downloaded.
Reads: the Hub. Writes: the preset's folder.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.common.errors import ParamsError, StageError, shown
from stages.core.common.redaction import brief
from stages.core.fetch.hub import Source, asked, hub_name, import_hub
from stages.core.fetch.local import check_vocabulary, config_format, other_kind
from stages.core.files import read_json
from stages.core.presets import keras_h5, safetensors
from stages.core.presets.architecture import Architecture
from stages.core.presets.formats import format_of
from stages.core.presets.hf_config import MODEL_TYPES
from stages.core.presets.manifest import PresetFile, fault, sha256_with_progress
from stages.core.presets.tokenizer import HUGGING_FACE_VOCABULARY, JSON_VOCABULARY
from stages.core.presets.untrusted import read_object

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

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
FIRST_READ = 1 << 17  # bytes; most headers are shorter, so one request reads them


def needed_files(source: Source, info: ModelInfo) -> list[RepoSibling]:
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


def refuse_other_models(source: Source, config: dict[str, Any] | None) -> None:
    """Stop before anything is downloaded where the Hub knows that the model is another.

    Raises:
        ParamsError: not a text Gemma.
    """
    kind = (config or {}).get("model_type")
    if isinstance(kind, str) and kind not in MODEL_TYPES:
        raise ParamsError(
            f"{source.repo} is not a text Gemma ({', '.join(MODEL_TYPES)}). Received: model_type={kind}\n"
            "Choose a text model of Gemma 1, 2 or 3, such as hf://google/gemma-3-1b-pt."
        )


def checked_architecture(source: Source, folder: Path) -> Architecture:
    """Return the architecture that the configuration states.

    Raises:
        ParamsError: it is not a text Gemma's; the error says why.
    """
    try:
        content = read_json(folder / CONFIG)
        return format_of(config_format(content)).read_architecture(folder)
    except (StageError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ParamsError(
            f"{source.repo} is not a text Gemma that this project runs. Received: {brief(error)}\n"
            "Choose a text model of Gemma 1, 2 or 3, such as hf://google/gemma-3-1b-pt."
        ) from error


def check_headers(source: Source, commit: str, needed: list[RepoSibling], folder: Path) -> None:
    """Bring the small files of a preset, and check whether the weights are worth having, by their headers.

    What is checked: every key of the configuration, every file that an index names, name, shape and dtype of every
    tensor of a plain checkpoint, and that the vocabulary has the size of the table. The headers of keras-hub's HDF5
    files are spread over them, so that these are checked when they are here.

    Raises:
        ParamsError: the preset could not be used; says why.
    """
    files = {each.rfilename: each for each in needed}

    def save(name: str) -> None:
        if differs(folder, files[name]):
            download(source, commit, files[name], folder)

    save(CONFIG)
    architecture = checked_architecture(source, folder)
    plain = any(name.endswith(".safetensors") for name in files)
    try:
        weights: tuple[str, ...] = (safetensors.SINGLE,) if plain else ()
        for name in INDEXES & files.keys():
            save(name)
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
                save(name)
        check_vocabulary(folder, "safetensors" if plain else "keras", architecture)
    except ParamsError:
        raise
    except StageError as error:
        # The folder is none of the user's.
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


def download(source: Source, commit: str, file: RepoSibling, folder: Path) -> None:
    """Download one file with huggingface_hub and verify it; a copy of other bytes is downloaded again once.

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
        difference = differs(folder, file)
        if difference is None:
            return
    path.unlink(missing_ok=True)
    raise StageError(
        f"{file.rfilename} of {source.repo} came from {hub_name()} with other bytes than announced: {difference}\n"
        "Nothing of it was kept. Run `python -m stages.fetch` again; if it stays so, a proxy may alter downloads."
    )


def differs(folder: Path, file: RepoSibling) -> str | None:
    """Return how a file differs from what the Hub says of it, as "expected ... Received: ...", or None."""
    if file.lfs is not None:
        return fault(folder, PresetFile(file.rfilename, file.lfs.size, file.lfs.sha256))
    path = folder / file.rfilename
    if not path.is_file():
        return "expected a file. Received: no such file"
    content = path.read_bytes()
    # Small files are in git itself, which names a file by the SHA-1 of a header and its bytes.
    digest = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return None if digest == file.blob_id else f"expected git object {file.blob_id}. Received: {digest}"


def sha256_of(folder: Path, file: RepoSibling) -> str:
    """Return the SHA-256 of a verified file."""
    return file.lfs.sha256 if file.lfs is not None else sha256_with_progress(folder / file.rfilename)
