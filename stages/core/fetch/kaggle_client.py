"""One model at Kaggle, through kagglehub: its files, their download, and what Kaggle refuses, in two lines.

Purpose: kagglehub does the transfer, resumes it and compares checksums; this adds retries when Kaggle is busy or a
transfer breaks off, and actionable errors. Files are fetched one by one, never as an
archive, so nothing has to be unpacked.
Reads: Kaggle. Writes: kagglehub's own cache folder.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stages.core.common.errors import StageError
from stages.core.common.redaction import brief
from stages.core.fetch.disk import explain_unwritten
from stages.core.fetch.kaggle_credentials import NEW_TOKEN, SETTINGS_PAGE, Credentials, import_kagglehub, kaggle_host

if TYPE_CHECKING:
    from requests import Response

logger = logging.getLogger(__name__)

T = TypeVar("T")

BUSY_WAITS = (1.0, 4.0, 16.0)  # seconds before asking again, when Kaggle does not say how long
BROKEN_WAITS = (0.5, 1.0, 2.0)  # seconds before a transfer that broke off is resumed
LONGEST_WAIT = 60.0  # seconds; beyond that the user should run it again later
PAGE = 100  # files per page of a listing
# Files of a preset that some stage reads, or a user. Others are left out, above all those that can hold a pickle.
WANTED = (".json", ".h5", ".spm", ".md", ".txt")
MAKE_ROOM = "Make room, or set KAGGLEHUB_CACHE to a folder on a larger disk."
OTHER_PLACE = "Mend its rights, or set KAGGLEHUB_CACHE to a folder of your own."


class KaggleRefused(StageError):
    """Kaggle answered with an HTTP status that is an error, also after retries."""

    def __init__(self, message: str, status: int) -> None:
        """Keep the status with the message."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class KaggleModel:
    """A model at Kaggle.

    Attributes:
        handle: as kagglehub writes it, owner/model/framework/variation/version.
        credentials: those in use, for messages.
    """

    handle: str
    credentials: Credentials

    @property
    def page(self) -> str:
        """The model's page, where its license is accepted."""
        return "https://www.kaggle.com/models/" + "/".join(self.handle.split("/")[:2])

    @property
    def folder(self) -> Path:
        """kagglehub's folder of the model's files, which may not exist."""
        return Path(import_kagglehub().config.get_cache_folder()) / "models" / self.handle

    def here(self) -> Path | None:
        """Return the folder if kagglehub has downloaded the whole model before; in a Kaggle notebook attach it.

        Raises:
            StageError: the notebook could not attach it.
        """
        hub = import_kagglehub()
        from kagglesdk.kaggle_env import is_in_kaggle_notebook

        if is_in_kaggle_notebook() and not hub.config.is_kaggle_cache_disabled():
            return self._answer(lambda: Path(hub.model_download(self.handle)))
        whole = hub.cache.Cache().load_from_cache(hub.handle.parse_model_handle(self.handle))
        return Path(whole) if whole else None

    def files(self) -> dict[str, int]:
        """Return the names of the model's files, as far as they are wanted, with their sizes in bytes.

        Raises:
            StageError: Kaggle cannot be reached, refuses, or names a file outside the model's folder.
        """
        from kagglesdk.models.types.model_api_service import ApiListModelInstanceVersionFilesRequest

        hub = import_kagglehub()
        found: dict[str, int] = {}
        token = None
        while token != "":
            request = self._request(ApiListModelInstanceVersionFilesRequest())
            request.page_size, request.page_token = PAGE, token

            def ask(request: Any = request) -> Any:
                with hub.clients.build_kaggle_client() as client:
                    return client.models.model_api_client.list_model_instance_version_files(request)

            listing = self._answer(ask)
            page = {file.name: file.size for file in listing.files}
            # A listing that repeats itself would never end.
            token = listing.next_page_token if page.keys() - found.keys() else ""
            found |= page
        for name in found:
            if not name.isprintable() or "\\" in name or {"", ".", ".."} & set(name.split("/")):
                raise StageError(
                    f"A file of {self.handle} must have a plain name within the model's folder. Received: {name!r}\n"
                    "Nothing was downloaded. Tell the owner of the model."
                )
        return {name: size for name, size in sorted(found.items()) if is_wanted(name)}

    def missing_bytes(self, files: dict[str, int]) -> int:
        """Return how many bytes of the files are not in kagglehub's folder yet."""
        sizes = {name: path.stat().st_size for name in files if (path := self.folder / name).is_file()}
        return sum(max(0, size - sizes.get(name, 0)) for name, size in files.items())

    def download(self, name: str) -> Path:
        """Return the path of one file, downloaded or resumed if necessary.

        Raises:
            StageError: Kaggle refuses or cannot be reached, checksums differ, or the file cannot be written.
        """
        return self._answer(lambda: Path(import_kagglehub().model_download(self.handle, name)), name)

    def ask_leave(self, name: str) -> None:
        """Request a file and discard the response: whether Kaggle grants access.

        Raises:
            StageError: Kaggle refuses or cannot be reached.
        """
        from kagglesdk.models.types.model_api_service import ApiDownloadModelInstanceVersionRequest

        request = self._request(ApiDownloadModelInstanceVersionRequest())
        request.path = name

        def ask() -> None:
            with import_kagglehub().clients.build_kaggle_client() as client:
                client.models.model_api_client.download_model_instance_version(request).close()

        self._answer(ask)

    def user(self) -> str | None:
        """Return the name of the account; None if Kaggle does not report it or does not know the credentials."""
        hub = import_kagglehub()
        if self.credentials.source is None:
            return None
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return hub.whoami(verbose=False)["username"]
        except hub.exceptions.UnauthenticatedError:
            return None

    def _request(self, request: Any) -> Any:
        """Return a request of Kaggle's library with the model filled in."""
        handle = import_kagglehub().handle.parse_model_handle(self.handle)
        request.owner_slug, request.model_slug = handle.owner, handle.model
        request.framework, request.instance_slug = handle.framework_enum(), handle.variation
        request.version_number = handle.version
        return request

    def _answer(self, call: Callable[[], T], name: str | None = None) -> T:
        """Return what kagglehub answers, with retries where they can help.

        Args:
            call: the question.
            name: the file that is being downloaded: broken transfers are resumed; None if none is.

        Raises:
            StageError: as Kaggle, the network or the disk answered.
        """
        hub = import_kagglehub()
        import requests

        what = f"{name} of {self.handle}" if name else self.handle
        busy, broken, corrupt, had = iter(BUSY_WAITS), iter(BROKEN_WAITS), 0, self._bytes(name)
        while True:
            try:
                # kagglehub prints on standard output when there is a newer version of it.
                with contextlib.redirect_stdout(sys.stderr):
                    return call()
            except requests.HTTPError as error:
                status = _status(error.response)
                if (pause := _pause(status, error.response, busy)) is None:
                    raise KaggleRefused(self._explain(status) + _asked(), status) from error
                logger.info(f"Kaggle answered {status}; asking again in {pause:g} s.")
                time.sleep(pause)
            except hub.exceptions.DataCorruptionError as error:
                corrupt += 1
                if corrupt == 2:
                    raise StageError(
                        f"{what} failed its MD5 check twice. Received: {brief(error)}\n"
                        "Nothing of it was kept. See whether a proxy alters downloads, and run this again later."
                    ) from error
                logger.info(f"{what} failed its MD5 check; downloading it again.")
            except (requests.RequestException, ConnectionError) as error:
                if (has := self._bytes(name)) > had:
                    broken, had = iter(BROKEN_WAITS), has
                if name is None or (pause := next(broken, None)) is None:
                    raise StageError(self._unreachable(what, error) + _asked()) from error
                time.sleep(pause)
            except OSError as error:
                place = self.folder / name if name else self.folder
                raise StageError(explain_unwritten(error, place, MAKE_ROOM, OTHER_PLACE)) from error
            except Exception as error:
                # In notebooks kagglehub has errors of its own for the machine around it, with no common type.
                if not isinstance(error, ValueError) and not type(error).__module__.startswith("kaggle"):
                    raise
                raise StageError(
                    f"kagglehub could not get {what}. Received: {brief(error)}\n"
                    "Try it alone: `python -c \"import kagglehub; kagglehub.model_download('" + self.handle + "')\"`."
                ) from error

    def _bytes(self, name: str | None) -> int:
        """Return how much of a file is here, in bytes."""
        with contextlib.suppress(OSError):
            return (self.folder / name).stat().st_size if name else 0
        return 0

    def _explain(self, status: int) -> str:
        """Return two lines for an HTTP status that Kaggle answered with."""
        first = f"Kaggle answered {status} for {self.handle}"
        if status in (401, 403) and self.credentials.source is None:
            return (
                f"{first}: it needs an account that accepted the license, and no credentials were found.\n"
                f"Accept it at {self.page}, make an API token at {SETTINGS_PAGE}, and set KAGGLE_API_TOKEN."
            )
        if status == 401:
            return f"{first}: it does not accept the credentials of {self.credentials.source}.\n{NEW_TOKEN}"
        if status == 403:
            return (
                f"{first}: your account has not accepted the license (credentials: {self.credentials.source}).\n"
                f"Accept it at {self.page} and run this again."
            )
        if status == 404:
            return (
                f"Kaggle answered 404: it has no model {self.handle}.\n"
                f"See {self.page} for its variations and versions, and set fetch.preset."
            )
        if status == 429:
            return f"{first}: too many requests.\nWait some minutes and run `python -m stages.fetch` again."
        return f"{first}.\nRun `python -m stages.fetch` again later; it resumes where it broke off."

    def _unreachable(self, what: str, error: Exception) -> str:
        """Return two lines for a network that failed."""
        return (
            f"Kaggle could not be reached for {what}, or the transfer broke off. Received: {brief(error)}\n"
            "Check the network and run `python -m stages.fetch` again; it resumes where it broke off."
        )


def _asked() -> str:
    """Return a note on KAGGLE_API_ENVIRONMENT for the end of a message; empty if it is not set."""
    host = kaggle_host()
    return "" if host == "api.kaggle.com" else f" (KAGGLE_API_ENVIRONMENT had {host} asked.)"


def is_wanted(name: str) -> bool:
    """Return whether a file of a preset is one that some stage or a user reads; hidden files are not."""
    return name.endswith(WANTED) and not any(part.startswith(".") for part in name.split("/"))


def _status(response: Response | None) -> int:
    """Return the status of an answer; Kaggle writes some errors into the body of an answer that is 200."""
    if response is None:
        return 0
    if response.status_code < 400:
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            return int(response.json().get("code"))
    return response.status_code


def _pause(status: int, response: Response | None, waits: Iterator[float]) -> float | None:
    """Return how many seconds to wait before asking again; None where that cannot help or would take too long."""
    if response is None or (status != 429 and status < 500):
        return None
    pause = next(waits, None)
    asked = response.headers.get("Retry-After", "")
    if pause is not None and asked.isdecimal():
        pause = float(asked)
    return None if pause is None or pause > LONGEST_WAIT else pause
