"""A Gemma from Hugging Face: a keras-hub preset (hf://keras/gemma3_1b) or a plain checkpoint
(hf://google/gemma-3-1b-pt).

Purpose: resolve a handle to one commit, have huggingface_hub download the files that are needed, verify each of them,
and pin them. No pickle and no program is ever among them. Once they are here, no network is asked.
Reads: the Hub, with the token that huggingface_hub finds. Writes, below our cache folder's `presets/`: the preset's
folder `<owner>--<model>-huggingface-<commit>`, beside it a .json with what was found, and one with the commit that a
revision stood for.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, unquote

from stages.core.common.errors import ParamsError, StageError, shown
from stages.core.common.paths import lend_a_home
from stages.core.common.redaction import (
    brief,
    check_addresses,
    check_private,
    check_proxies,
    host_of,
    is_private,
    usable,
)
from stages.core.fetch.catalog import EMBEDDING, HEALTH, REGISTRY, VISION, name_of, registered
from stages.core.fetch.check import Check
from stages.core.fetch.disk import UNWRITTEN, check_room, explain_unwritten, free_bytes, one_at_a_time
from stages.core.fetch.local import check_contents, check_vocabulary, folder_format, other_kind
from stages.core.files import read_json, write_json
from stages.core.presets import keras_h5, safetensors
from stages.core.presets.architecture import Architecture, read_architecture
from stages.core.presets.manifest import LICENCE, Manifest, PresetFile, fault, sha256_with_progress
from stages.core.presets.tokenizer import HUGGING_FACE_VOCABULARY, JSON_VOCABULARY
from stages.core.presets.untrusted import read_object

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

HANDLE = re.compile(r"hf://(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
SITE = "https://huggingface.co"
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
WAITS = (1, 2, 4)  # seconds between attempts at a question that the Hub is too busy for
LONGEST_WAIT = 60  # seconds, where the Hub names a time itself

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A handle taken apart: the repository (owner/model), and the revision (branch, tag or commit)."""

    repo: str
    revision: str

    @property
    def page(self) -> str:
        """The address of the model's page, for a person."""
        return f"{SITE}/{self.repo}"

    def base(self, cache: Path) -> Path:
        """What the names of its folder and records begin with."""
        return cache / "presets" / f"{self.repo.replace('/', '--')}-huggingface"

    def folder(self, cache: Path, commit: str) -> Path:
        """Where the files of a commit lie."""
        base = self.base(cache)
        return base.with_name(f"{base.name}-{commit}")


def source_of(preset: str) -> Source:
    """Take `hf://owner/model` or `hf://owner/model@revision` apart.

    Raises:
        ParamsError: it is not written so, or names a preset that is known not to be a text Gemma.
    """
    match = HANDLE.fullmatch(preset)
    if not match or "--" in match["repo"] or ".." in preset:
        raise ParamsError(
            "fetch.preset must be hf://owner/model or hf://owner/model@revision with source: huggingface. "
            f"Received: fetch.preset={preset}\nFor example hf://google/gemma-3-1b-pt, or hf://keras/gemma3_1b."
        )
    if name_of(preset) in (*VISION, *EMBEDDING):
        registered(preset, "fetch.preset")
    return Source(match["repo"], match["revision"] or "main")


def fetch_huggingface(preset: str, cache: Path, say: Callable[[str], None]) -> Manifest:
    """Bring a preset from Hugging Face into the cache folder and describe it; with no network if it is there unaltered.

    A branch or tag (`main`, if none is named) stands for the commit that it was at the first fetch.

    Args:
        preset: `hf://owner/model`, with `@branch`, `@tag` or `@commit` if wanted.
        cache: the cache folder.
        say: prints one line for the person.

    Raises:
        ParamsError: not such a handle, or not a text Gemma.
        StageError: no consent, no network, no room, other bytes than those announced: two lines each.
    """
    source = source_of(preset)
    found = _present(source, preset, cache)
    if found is None:
        with one_at_a_time(source.base(cache), say):
            try:
                found = _present(source, preset, cache) or _restore(source, preset, cache, say)
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
    credentials, user, consent, size, handle = _credentials(), None, None, 0, preset
    try:
        with _explained(source):
            api = _client()
            if credentials:
                user = _asked(api.whoami)["name"]
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
        "huggingface", handle, credentials, user, consent, present, size, free_bytes(cache), host=host_of(_endpoint())
    )


def architecture(preset: str, cache: Path) -> Architecture:
    """Return a preset's class and arguments; of its files only `config.json` is fetched, if it is not here.

    Raises:
        ParamsError, StageError: as `fetch_huggingface`.
    """
    source = source_of(preset)
    commit = _commit(source, cache)
    if commit is None or not _has_configuration(source, cache, commit):
        with one_at_a_time(source.base(cache), lambda text: None), _explained(source):
            info = _information(_client(), source, cache)
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
    return Manifest(preset, "huggingface", record["format"], handle, folder, record["licence"], record["files"])


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
        return {"format": content["format"], "licence": content["licence"], "files": files}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _restore(source: Source, preset: str, cache: Path, say: Callable[[str], None]) -> Manifest:
    """Download what is missing or altered, verify it, and write down what was found."""
    with _explained(source):
        info = _information(_client(), source, cache)
        commit = str(info.sha)
        folder = source.folder(cache, commit)
        _refuse_other_models(source, info.config)
        needed = sorted(_needed(source, info), key=lambda each: each.rfilename)
        # What a killed run left of a file is of no use to another.
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        missing = [each for each in needed if _differs(folder, each)]
        check_room(folder, sum(each.size or 0 for each in missing), f"the files of {source.repo}")
        megabytes = sum(each.size or 0 for each in missing) / 1e6
        say(f"Downloading {source.repo} from {_name()}: {megabytes:,.0f} MB in {len(missing)} files.")
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
            f"{changed[0]} of {source.repo} came from {_name()} with other bytes than the first time, under the "
            f"same commit. Received: fetch.preset={preset}\n"
            f"Delete {_record(source, cache, commit)} if you want to accept them, and run this again."
        )
    record = {"format": file_format, "licence": _licence(source, info), "files": files}
    write_json(_record(source, cache, commit), record | {"files": [asdict(file) for file in files]})
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
    start = _asked(lambda: _beginning(source, commit, name, FIRST_READ))
    if len(start) < (end := safetensors.header_end(start, name)):
        start = _asked(lambda: _beginning(source, commit, name, end))
    return safetensors.read_header(start, name, file.size)


def _beginning(source: Source, commit: str, name: str, count: int) -> bytes:
    """Return the first bytes of a file at the Hub, fewer if it has no more; a server may send all, and is not heard."""
    hub = _hub()
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
    return _asked(lambda: api.model_info(source.repo, revision=revision, files_metadata=True))


def _has_consented(api: HfApi, source: Source) -> bool:
    """Return whether the account may download from a gated repository."""
    from huggingface_hub.errors import GatedRepoError

    try:
        _asked(lambda: api.auth_check(source.repo))
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
        _asked(
            lambda forced=attempt == 2: _hub().hf_hub_download(
                source.repo, file.rfilename, revision=commit, local_dir=folder, force_download=forced
            )
        )
        difference = _differs(folder, file)
        if difference is None:
            return
    path.unlink(missing_ok=True)
    raise StageError(
        f"{file.rfilename} of {source.repo} came from {_name()} with other bytes than announced: {difference}\n"
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


def _licence(source: Source, info: ModelInfo) -> dict[str, str]:
    """Return `name` and `url` of the terms that the model's card states."""
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
        return {"name": "terms on the model's page", "url": source.page}
    return {"name": named, "url": link if isinstance(link, str) and link.startswith("https://") else source.page}


def _credentials() -> str | None:
    """Return where huggingface_hub found a token; None if it found none.

    Raises:
        StageError: it cannot be one; names the source and does not show it.
    """
    hub = _hub()
    from huggingface_hub import constants

    path = str(constants.HF_TOKEN_PATH)
    try:
        with _explained(None):
            token = hub.get_token()
    except StageError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise StageError(
                f"The file of a token must be plain text. Received: {path}, which is not UTF-8\n"
                "Store it again with `hf auth login`."
            ) from None
        raise
    if token is None:
        return None
    named = [
        name
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        if "".join(token.split()) == "".join(os.environ.get(name, "").split())
    ]
    if named:
        source = f"the environment variable {named[0]}"
    elif os.environ.get("HF_OIDC_RESOURCE"):
        source = "the exchange that HF_OIDC_RESOURCE asks for"
    else:
        source = path if Path(path).is_file() else "the notebook's secret HF_TOKEN"
    usable(source, token, of="Hugging Face")
    return source


def _client() -> HfApi:
    """Return the Hub's client, once its token is known to be one."""
    _credentials()
    return _hub().HfApi()


def _endpoint() -> str:
    """Return the address that huggingface_hub asks."""
    return os.environ.get("HF_ENDPOINT") or SITE


def _name() -> str:
    """Return what the Hub is called in messages: its host, where HF_ENDPOINT leads elsewhere."""
    return "Hugging Face" if _endpoint().rstrip("/") == SITE else f"{host_of(_endpoint())} (HF_ENDPOINT)"


@functools.cache
def _hub() -> ModuleType:
    """Import huggingface_hub so that it neither chats nor tells more than the request; it reads both when imported.

    Raises:
        StageError: a token would go where others can read it, or a setting of huggingface_hub's is malformed.
    """
    lend_a_home()
    check_proxies()
    check_addresses({"HF_ENDPOINT": _endpoint()})
    check_private("HF_ENDPOINT", _endpoint())
    os.environ["HF_ENDPOINT"] = _endpoint()  # an empty one is no address to the client
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import huggingface_hub
        from huggingface_hub.utils._http import default_client_factory
    except ValueError as error:
        raise StageError(
            f"huggingface_hub cannot read its settings. Received: {brief(error)}\n"
            "Correct or unset the environment variables that begin with HF_."
        ) from error

    def client() -> Any:
        made = default_client_factory()
        made.event_hooks["request"].append(_refuse_open_roads)
        return made

    huggingface_hub.set_client_factory(client)
    return huggingface_hub


def _refuse_open_roads(request: Any) -> None:
    """Stop a request that would carry a token, such as one that a redirect asks for, where others can read it."""
    if "authorization" in request.headers and not is_private(str(request.url)):
        raise StageError(
            f"{_name()} led to an address that is not https, where others could read the token. "
            f"Received: host {request.url.host}\nNothing was sent there. Set HF_ENDPOINT to another address."
        )


def _asked(question: Callable[[], T]) -> T:
    """Ask the Hub, and again after a while when it is too busy or in trouble."""
    from huggingface_hub.errors import HfHubHTTPError

    for wait in WAITS:
        try:
            return question()
        except HfHubHTTPError as error:
            if error.response.status_code != 429 and error.response.status_code < 500:
                raise
            named = error.response.headers.get("Retry-After", "")
            time.sleep(min(int(named), LONGEST_WAIT) if named.isdecimal() else wait)
    return question()


@contextlib.contextmanager
def _explained(source: Source | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into two lines for the person."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OIDCError

    model = source.repo if source else "the token"
    try:
        yield
    except (
        LocalEntryNotFoundError,
        HfHubHTTPError,
        httpx2.HTTPError,
        OIDCError,
        httpx2.InvalidURL,
        OSError,
        ValueError,
    ) as raised:
        error: BaseException = raised
        while isinstance(error, LocalEntryNotFoundError | ValueError) and error.__cause__ is not None:
            error = error.__cause__
        if isinstance(error, HFValidationError):
            raise ParamsError(
                f"fetch.preset must name a repository as Hugging Face does. Received: {brief(error)}\n"
                "For example hf://google/gemma-3-1b-pt, or hf://keras/gemma3_1b."
            ) from raised
        raise StageError(_explain(error, model, source)) from raised


def _explain(error: BaseException, model: str, source: Source | None) -> str:
    """Return two lines for an error of huggingface_hub's or of the system's."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return _explain_status(error, model, source)
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"{model} is not here whole, and HF_HUB_OFFLINE forbids asking {_name()}.\n"
            "Unset HF_HUB_OFFLINE and run this again."
        )
    if isinstance(error, OSError) and error.errno in UNWRITTEN:
        return explain_unwritten(error, f"{model}'s folder")
    return (
        f"{model} could not be had from {_name()}. Received: {brief(error)}\n"
        "Check the network and run this again; files that are here whole are not downloaded again."
    )


def _explain_status(error: Any, model: str, source: Source | None) -> str:
    """Return two lines for an HTTP status that the Hub answered with."""
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    status, page = error.response.status_code, source.page if source else SITE
    found = _credentials()
    if isinstance(error, GatedRepoError) and found is None:
        return (
            f"{_name()} answered {status} for {model}: it wants an account that accepted the licence, and no token "
            f"was found.\nAccept it at {page}, make a token at {SITE}/settings/tokens, and set HF_TOKEN "
            "(or store it with `hf auth login`)."
        )
    if isinstance(error, GatedRepoError) and status != 401:
        return (
            f"{_name()} answered {status} for {model}: your account has not accepted the licence, or the token may "
            f"not read gated models.\nAccept it at {page}, and look at the token at {SITE}/settings/tokens."
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{_name()} answered {status}: {model} has no revision {_revision_asked_for(error)}.\n"
            f"See {page}/commits for its commits, and set fetch.preset."
        )
    if status == 401 and found is not None:
        return (
            f"{_name()} answered {status} for {model}: it does not accept the token from {found}.\n"
            f"Make a new one at {SITE}/settings/tokens, and set HF_TOKEN."
        )
    if status in (401, 404):
        hint = " Or it is a private one: set HF_TOKEN." if found is None else ""
        return f"{_name()} answered {status}: it has no model {model}.{hint}\nSee {page}, and set fetch.preset."
    if status == 403:
        return (
            f"{_name()} answered 403 for {model}: access is forbidden.\n"
            f"See {page}, and the token's rights at {SITE}/settings/tokens."
        )
    if status == 429 or status >= 500:
        return (
            f"{_name()} answered {status} for {model}, {len(WAITS) + 1} times.\n"
            "Run this again later; files that are here whole are not downloaded again."
        )
    return f"{_name()} answered {status} for {model}.\nSee {page}, and run this again later."


def _revision_asked_for(error: Any) -> str:
    """Return the revision that a refused request named: of a branch, the commit that it was here if that is known."""
    named = re.search(r"/(?:revision|resolve)/([^/?]+)", str(error.response.url))
    return unquote(named[1]) if named else ""
