"""Which Kaggle credentials will be used, and where they were found.

Purpose: kagglehub looks in many places and does not report which it used. Here the same places are searched in the same
order, with kagglehub's own functions where it has them, so that what is reported is what is used;
credentials that cannot work are reported before any request.
Reads: the environment, `~/.kaggle`, `KAGGLE_CONFIG_DIR`, the terminal. Writes nothing: secrets stay in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import click

from stages.core.common.errors import StageError
from stages.core.common.paths import lend_a_home
from stages.core.common.redaction import check_addresses, check_private, check_proxies, usable

SETTINGS_PAGE = "https://www.kaggle.com/settings/api"
NEW_TOKEN = f"Make a new API token at {SETTINGS_PAGE} and store it as Kaggle says."


@dataclass(frozen=True)
class Credentials:
    """What was found, and where; never shown as a whole.

    Attributes:
        source: where they were found, for messages; None if nothing was found.
        notes: one line each, for the user.
        secrets: the values themselves: a token, or a user's name and key.
    """

    source: str | None
    notes: tuple[str, ...] = ()
    secrets: tuple[str, ...] = field(default=(), repr=False)


def kaggle_credentials() -> Credentials:
    """Return what kagglehub will use: the first that is found, in its order.

    A Kaggle notebook's own token; KAGGLE_API_TOKEN (a token, or the path of a file with one); ~/.kaggle/access_token;
    KAGGLE_USERNAME and KAGGLE_KEY; kaggle.json in KAGGLE_CONFIG_DIR, else in ~/.kaggle; the secrets of a Colab
    notebook; ~/.kaggle/kaggle.json even with KAGGLE_CONFIG_DIR set.

    Raises:
        StageError: the first that is found cannot be used (malformed or unreadable file, characters that no token has).
    """
    config = import_kagglehub().config
    from kagglesdk import kaggle_env

    home = Path("~/.kaggle").expanduser()
    try:
        token, place = kaggle_env.get_access_token_from_env()
    except (OSError, UnicodeDecodeError) as error:
        # If the file's name is too long for one, it is the token itself.
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise StageError(
            "The API token must be readable: KAGGLE_API_TOKEN (a token, or the path of a file with one), or "
            f"{home / 'access_token'}. Received: {reason}\nPut the token alone into a file, and have KAGGLE_API_TOKEN "
            "name that file."
        ) from None
    if token:
        return _token(token, place, home)
    username, key = os.environ.get("KAGGLE_USERNAME"), os.environ.get("KAGGLE_KEY")
    notes: tuple[str, ...] = ()
    if bool(username) != bool(key):
        given, other = ("KAGGLE_USERNAME", "KAGGLE_KEY") if username else ("KAGGLE_KEY", "KAGGLE_USERNAME")
        notes = (f"{given} is set and {other} is not: they count only together, so {given} was passed over.",)
    elif username and key:
        source = "KAGGLE_USERNAME and KAGGLE_KEY"
        return Credentials(source, (), usable(source, username, key))
    named = Path(os.environ.get("KAGGLE_CONFIG_DIR", config.DEFAULT_KAGGLE_CREDENTIALS_FOLDER)) / "kaggle.json"
    if named.exists():
        return _from_file(named, notes)
    try:
        found = config.get_kaggle_credentials()
    except (ValueError, OSError) as error:
        raise StageError(f"kagglehub could not use the credentials it found.\n{NEW_TOKEN}") from error
    if found is not None:
        source = "the secrets of the Colab notebook"
        secrets = (value for value in (found.api_key, found.username, found.key) if value)
        return Credentials(source, notes, usable(source, *secrets))
    if (home / "kaggle.json").exists():
        # Kaggle's own library falls back on this file where kagglehub does not; passed on to kagglehub, both agree.
        credentials = _from_file(home / "kaggle.json", notes)
        config.set_kaggle_credentials(*credentials.secrets)
        return credentials
    return Credentials(None, notes)


def import_kagglehub() -> ModuleType:
    """Import kagglehub with standard output kept clean and progress bars at a terminal only.

    It and tqdm read both settings when they are first imported.

    Raises:
        StageError: a setting under which Kaggle's library prints the headers of its requests, sends them where others
            can read them, or fails.
    """
    if (environment := os.environ.get("KAGGLE_API_ENVIRONMENT", "PROD")) not in ("PROD", "LOCALHOST"):
        raise StageError(
            "KAGGLE_API_ENVIRONMENT is for Kaggle's own developers (TEST prints credentials) and must not be set. "
            f"Received: KAGGLE_API_ENVIRONMENT={environment}\nUnset it."
        )
    lend_a_home()
    check_proxies()
    if environment == "LOCALHOST":
        check_private("KAGGLE_API_ENVIRONMENT", "http://localhost")
    if proxy := os.environ.get("KAGGLE_DATA_PROXY_URL"):  # a Kaggle notebook's, which gets tokens of its own
        check_addresses({"KAGGLE_DATA_PROXY_URL": proxy})
        check_private("KAGGLE_DATA_PROXY_URL", proxy)
    # Colab's store of models is asked by plain http, with the credentials.
    os.environ["DISABLE_COLAB_CACHE"] = "true"
    os.environ.setdefault("KAGGLEHUB_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    # Its log lines go to what is standard output now.
    with contextlib.redirect_stdout(sys.stderr):
        import kagglehub
        import kagglehub.cache
        import kagglehub.clients
        import kagglehub.config
        import kagglehub.exceptions
        import kagglehub.handle

    return kagglehub


def kaggle_host() -> str:
    """Return the host that is asked for Kaggle's models, as Kaggle's library has it."""
    from kagglesdk import kaggle_env

    return kaggle_env.get_endpoint(kaggle_env.get_env()).partition("//")[2]


def ask_for_token() -> Credentials | None:
    """Ask for an API token at the terminal and hand it to kagglehub, for this run only.

    Returns:
        None without a terminal, or when nothing was typed.

    Raises:
        StageError: what was typed cannot be a token.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    click.echo(f"No Kaggle credentials were found. An API token can be made at {SETTINGS_PAGE}.", err=True)
    typed = click.prompt(
        "Token (not shown, for this run only; Enter to do without)",
        default="",
        hide_input=True,
        show_default=False,
        err=True,
    ).strip()
    if not typed:
        return None
    source = "the token typed in"
    secrets = usable(source, typed)
    import_kagglehub().config.set_kaggle_api_token(typed)
    return Credentials(source, (), secrets)


def _token(token: str, place: str, home: Path) -> Credentials:
    """Return a token and its source, from Kaggle's library's name of the source."""
    if place == "KAGGLE_API_TOKEN":
        named = Path(os.environ[place])
        if not named.exists():
            if os.environ[place].startswith(("/", "~", "./", "../")):
                raise StageError(
                    "KAGGLE_API_TOKEN must hold an API token, or the path of a file with one. Received: the path of a "
                    f"file that is not there\nCorrect the path, or make a token at {SETTINGS_PAGE}."
                )
            return Credentials(place, (), usable(place, token))
        source, path = f"{named}, which KAGGLE_API_TOKEN names", named
    elif place == "access_token":
        path = next(
            path for path in (home / "access_token", home / "access_token.txt") if path.exists() and path.stat().st_size
        )
        source = str(path)
    else:
        return Credentials("the Kaggle notebook's own token", (), usable(place, token))
    return Credentials(source, _open_to_others(path), usable(source, token))


def _from_file(path: Path, notes: tuple[str, ...]) -> Credentials:
    """Return the credentials of a kaggle.json.

    Raises:
        StageError: it cannot be read, or is not what Kaggle writes; what it holds is never shown.
    """
    wanted = f'{path} must be the file that Kaggle provides, {{"username": ..., "key": ...}}.'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StageError(
            f"{wanted} Received: {error.strerror}\nMake it readable for you, or set KAGGLE_API_TOKEN."
        ) from error
    except UnicodeDecodeError as error:
        raise StageError(f"{wanted} Received: not UTF-8 text\n{NEW_TOKEN}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        # Without `from`: the error carries the file's text along.
        reason = "brackets without end"
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise StageError(f"{wanted} Received: {reason}\n{NEW_TOKEN}") from None
    values = [content.get(name) for name in ("username", "key")] if isinstance(content, dict) else [None]
    if not all(isinstance(value, str) and value for value in values):
        # Not its keys: a key may be where its name should be.
        received = "no text for both" if isinstance(content, dict) else type(content).__name__
        raise StageError(f"{wanted} Received: {received}\n{NEW_TOKEN}")
    return Credentials(str(path), (*notes, *_open_to_others(path)), usable(str(path), *values))


def _open_to_others(path: Path) -> tuple[str, ...]:
    """Return a note if other users of the machine can read a file."""
    if os.name == "posix" and path.stat().st_mode & 0o077:
        return (f"{path} can be read by other users of this machine. `chmod 600 {path}` keeps it to you.",)
    return ()
