"""The Hugging Face Hub's client: addresses, tokens, retries, and its errors in two lines.

Reads: the Hub, with the token that huggingface_hub finds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from stages.core.common.errors import ParamsError, StageError
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
from stages.core.fetch.catalog import EMBEDDING, VISION, name_of, registered
from stages.core.fetch.disk import UNWRITTEN, explain_unwritten

if TYPE_CHECKING:
    from huggingface_hub import HfApi


HANDLE = re.compile(r"hf://(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)
SITE = "https://huggingface.co"
WAITS = (1, 2, 4)  # seconds between attempts while the Hub is too busy
LONGEST_WAIT = 60  # seconds, where the Hub names a time itself
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A parsed handle: the repository (owner/model), and the revision (branch, tag or commit)."""

    repo: str
    revision: str

    @property
    def page(self) -> str:
        """The address of the model's page, for a user."""
        return f"{SITE}/{self.repo}"

    def base(self, cache: Path) -> Path:
        """The common prefix of its folder and records."""
        return cache / "presets" / f"{self.repo.replace('/', '--')}-huggingface"

    def folder(self, cache: Path, commit: str) -> Path:
        """The folder of a commit's files."""
        base = self.base(cache)
        return base.with_name(f"{base.name}-{commit}")


def source_of(preset: str) -> Source:
    """Parse `hf://owner/model` or `hf://owner/model@revision`.

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


def credentials_source() -> str | None:
    """Return where huggingface_hub found a token; None if it found none.

    Raises:
        StageError: it cannot be one; names the source and does not show it.
    """
    hub = import_hub()
    from huggingface_hub import constants

    path = str(constants.HF_TOKEN_PATH)
    try:
        with explained(None):
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


def hub_client() -> HfApi:
    """Return the Hub's client, once its token is known to be one."""
    credentials_source()
    return import_hub().HfApi()


def endpoint() -> str:
    """Return the address that huggingface_hub asks."""
    return os.environ.get("HF_ENDPOINT") or SITE


def hub_name() -> str:
    """Return what the Hub is called in messages: its host, where HF_ENDPOINT leads elsewhere."""
    return "Hugging Face" if endpoint().rstrip("/") == SITE else f"{host_of(endpoint())} (HF_ENDPOINT)"


@functools.cache
def import_hub() -> ModuleType:
    """Import huggingface_hub without progress messages and telemetry; it reads both settings when imported.

    Raises:
        StageError: a token would be sent where others can read it, or a setting of huggingface_hub's is malformed.
    """
    lend_a_home()
    check_proxies()
    check_addresses({"HF_ENDPOINT": endpoint()})
    check_private("HF_ENDPOINT", endpoint())
    os.environ["HF_ENDPOINT"] = endpoint()  # an empty one is no address to the client
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
        made.event_hooks["request"].append(refuse_open_roads)
        return made

    huggingface_hub.set_client_factory(client)
    return huggingface_hub


def refuse_open_roads(request: Any) -> None:
    """Stop a request that would carry a token, such as one that a redirect asks for, where others can read it."""
    if "authorization" in request.headers and not is_private(str(request.url)):
        raise StageError(
            f"{hub_name()} led to an address that is not https, where others could read the token. "
            f"Received: host {request.url.host}\nNothing was sent there. Set HF_ENDPOINT to another address."
        )


def asked(question: Callable[[], T]) -> T:
    """Query the Hub, with retries if it is busy or fails."""
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
def explained(source: Source | None) -> Iterator[None]:
    """Convert errors of huggingface_hub into a StageError of two lines."""
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
        raise StageError(explain(error, model, source)) from raised


def explain(error: BaseException, model: str, source: Source | None) -> str:
    """Return two lines for an error of huggingface_hub's or of the system's."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return _explain_status(error, model, source)
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"{model} is not here whole, and HF_HUB_OFFLINE forbids asking {hub_name()}.\n"
            "Unset HF_HUB_OFFLINE and run this again."
        )
    if isinstance(error, OSError) and error.errno in UNWRITTEN:
        return explain_unwritten(error, f"{model}'s folder")
    return (
        f"{model} could not be downloaded from {hub_name()}. Received: {brief(error)}\n"
        "Check the network and run this again; files that are here whole are not downloaded again."
    )


def _explain_status(error: Any, model: str, source: Source | None) -> str:
    """Return two lines for an HTTP status that the Hub answered with."""
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    status, page = error.response.status_code, source.page if source else SITE
    found = credentials_source()
    if isinstance(error, GatedRepoError) and found is None:
        return (
            f"{hub_name()} answered {status} for {model}: it needs an account that accepted the license, and no "
            f"token was found.\nAccept it at {page}, make a token at {SITE}/settings/tokens, and set HF_TOKEN "
            "(or store it with `hf auth login`)."
        )
    if isinstance(error, GatedRepoError) and status != 401:
        return (
            f"{hub_name()} answered {status} for {model}: your account has not accepted the license, or the token may "
            f"not read gated models.\nAccept it at {page}, and look at the token at {SITE}/settings/tokens."
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{hub_name()} answered {status}: {model} has no revision {_revision_asked_for(error)}.\n"
            f"See {page}/commits for its commits, and set fetch.preset."
        )
    if status == 401 and found is not None:
        return (
            f"{hub_name()} answered {status} for {model}: it does not accept the token from {found}.\n"
            f"Make a new one at {SITE}/settings/tokens, and set HF_TOKEN."
        )
    if status in (401, 404):
        hint = " Or it is a private one: set HF_TOKEN." if found is None else ""
        return f"{hub_name()} answered {status}: it has no model {model}.{hint}\nSee {page}, and set fetch.preset."
    if status == 403:
        return (
            f"{hub_name()} answered 403 for {model}: access is forbidden.\n"
            f"See {page}, and the token's rights at {SITE}/settings/tokens."
        )
    if status == 429 or status >= 500:
        return (
            f"{hub_name()} answered {status} for {model}, {len(WAITS) + 1} times.\n"
            "Run this again later; files that are here whole are not downloaded again."
        )
    return f"{hub_name()} answered {status} for {model}.\nSee {page}, and run this again later."


def _revision_asked_for(error: Any) -> str:
    """Return the revision that a refused request named: of a branch, the commit that it was here if that is known."""
    named = re.search(r"/(?:revision|resolve)/([^/?]+)", str(error.response.url))
    return unquote(named[1]) if named else ""
