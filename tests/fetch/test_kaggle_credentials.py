"""Kaggle credentials: what is told is what Kaggle gets, and what cannot work is told without being shown."""

from __future__ import annotations

import base64
import json
import os
import pty
import subprocess
import sys
import termios

import pytest

from stages.core.common.errors import StageError
from stages.core.fetch.kaggle_credentials import import_kagglehub, kaggle_credentials
from tests.support import warm
from tests.support.repository import ROOT
from tests.support.servers import kaggle_server
from tests.support.servers.kaggle_server import HANDLE

FETCH = [
    "-m",
    "stages.fetch",
    "--out-root",
    "scratch/none",
    "--set=fetch.source=kaggle",
    f"--set=fetch.preset={HANDLE}",
]
TOKEN, USERNAME, KEY = "a-token-of-nobody", "nobody", "a-key-of-nobody"
BASIC = "Basic " + base64.b64encode(f"{USERNAME}:{KEY}".encode()).decode()


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    with kaggle_server.for_this_process(tmp_path, monkeypatch) as running:
        yield running


def write(path, content=None, mode=0o600):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"username": USERNAME, "key": KEY}) if content is None else content)
    path.chmod(mode)
    return path


# Where each case stores credentials, below the home; the words for the source; what Kaggle must get. The later places
# of the order are filled too, with values that would be seen.
ELSEWHERE = json.dumps({"username": "another", "key": "another-key"})
PLACES = {
    "KAGGLE_API_TOKEN": (
        {"KAGGLE_API_TOKEN": TOKEN, "KAGGLE_USERNAME": "another", "KAGGLE_KEY": "another-key"},
        {".kaggle/access_token": "another-token", ".kaggle/kaggle.json": ELSEWHERE},
        "KAGGLE_API_TOKEN",
        f"Bearer {TOKEN}",
    ),
    "a file that KAGGLE_API_TOKEN names": (
        {"KAGGLE_API_TOKEN": "{home}/token"},
        {"token": TOKEN, ".kaggle/access_token": "another-token"},
        "{home}/token, which KAGGLE_API_TOKEN names",
        f"Bearer {TOKEN}",
    ),
    "access_token": (
        {"KAGGLE_USERNAME": "another", "KAGGLE_KEY": "another-key"},
        {".kaggle/access_token": TOKEN + "\n", ".kaggle/kaggle.json": ELSEWHERE},
        "{home}/.kaggle/access_token",
        f"Bearer {TOKEN}",
    ),
    "KAGGLE_USERNAME and KAGGLE_KEY": (
        {"KAGGLE_USERNAME": USERNAME, "KAGGLE_KEY": KEY},
        {".kaggle/kaggle.json": ELSEWHERE},
        "KAGGLE_USERNAME and KAGGLE_KEY",
        BASIC,
    ),
    "KAGGLE_CONFIG_DIR": (
        {"KAGGLE_CONFIG_DIR": "{home}/config"},
        {"config/kaggle.json": None, ".kaggle/kaggle.json": ELSEWHERE},
        "{home}/config/kaggle.json",
        BASIC,
    ),
    "kaggle.json": ({"KAGGLE_CONFIG_DIR": None}, {".kaggle/kaggle.json": None}, "{home}/.kaggle/kaggle.json", BASIC),
    "kaggle.json beside an empty KAGGLE_CONFIG_DIR": (
        {},
        {".kaggle/kaggle.json": None},
        "{home}/.kaggle/kaggle.json",
        BASIC,
    ),
    "nothing": ({}, {}, "none in use", None),
}


@pytest.mark.parametrize("case", PLACES)
def test_the_source_that_is_told_is_the_one_that_kaggle_gets(kaggle, tmp_path, monkeypatch, case):
    environment, files, source, authorization = PLACES[case]
    home = tmp_path / "home"
    for name, value in environment.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value.format(home=home))
    for name, content in files.items():
        write(home / name, content)
    run = subprocess.run([warm.python(), *FETCH, "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    assert f"credentials  {source.format(home=home)}\n" in run.stdout
    assert kaggle.authorizations == {authorization}
    assert kaggle.storage_authorizations == {None}, "the storage is another host and must not see them"
    assert ("some?[31mbody" in run.stdout) == (authorization is not None), "who one is, and no control characters"


def test_the_secrets_of_a_colab_notebook_count_where_kagglehub_gives_them(kaggle, tmp_path):
    stand_in = tmp_path / "colab"
    write(stand_in / "IPython" / "__init__.py", "def get_ipython():\n    return 'google.colab shell'\n")
    secret = f"    if name != 'KAGGLE_API_TOKEN': raise KeyError(name)\n    return '{TOKEN}'\n"
    write(stand_in / "google" / "colab" / "__init__.py", "")
    write(stand_in / "google" / "colab" / "userdata.py", f"def get(name):\n{secret}")
    path = os.pathsep.join([str(stand_in), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, *FETCH, "--check"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "credentials  the secrets of the Colab notebook\n" in run.stdout
    assert kaggle.authorizations == {f"Bearer {TOKEN}"}


def test_a_kaggle_notebook_uses_its_own_token(kaggle, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setenv("KAGGLE_DATA_PROXY_URL", kaggle.url)
    monkeypatch.setenv("KAGGLE_API_V1_TOKEN", str(write(tmp_path / "notebook", TOKEN)))
    monkeypatch.setenv("KAGGLE_API_TOKEN", "another-token")
    found = kaggle_credentials()
    assert (found.source, found.secrets) == ("the Kaggle notebook's own token", (TOKEN,))


MALFORMED = {
    "no JSON": '{"username": "nobody", "key": "a-key-of',
    "a list": '["a-key-of-nobody"]',
    "no key": '{"username": "nobody"}',
    "a number for a key": '{"username": "nobody", "key": 7}',
    "an empty key": '{"username": "nobody", "key": ""}',
    "an empty file": "",
    "the key where its name should be": '{"a-key-of-nobody": "nobody"}',
    "brackets without end": "[" * 100_000,
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_one_clear_error_that_shows_nothing_of_it(kaggle, tmp_path, monkeypatch, case):
    path = write(tmp_path / "config" / "kaggle.json", MALFORMED[case])
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(path.parent))
    with pytest.raises(StageError) as caught:
        kaggle_credentials()
    first, second = str(caught.value).splitlines()
    assert first.startswith(
        f'{path} must be the file that Kaggle provides, {{"username": ..., "key": ...}}. Received: '
    )
    assert second.startswith("Make a new API token at https://www.kaggle.com/settings/api")
    assert "nobody" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_told_as_that(kaggle, tmp_path, monkeypatch):
    (tmp_path / "config" / "kaggle.json").mkdir(parents=True)  # unreadable for root too
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "config"))
    with pytest.raises(StageError, match=r"Received: Is a directory\nMake it readable"):
        kaggle_credentials()


@pytest.mark.parametrize("mode, warned", [(0o600, False), (0o640, True), (0o604, True)])
def test_a_file_that_others_can_read_is_used_with_a_warning(kaggle, tmp_path, monkeypatch, mode, warned):
    path = write(tmp_path / "config" / "kaggle.json", mode=mode)
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(path.parent))
    found = kaggle_credentials()
    assert found.secrets == (USERNAME, KEY)
    note = f"{path} can be read by other users of this machine. `chmod 600 {path}` keeps it to you."
    assert found.notes == ((note,) if warned else ())


@pytest.mark.parametrize("given, other", [("KAGGLE_USERNAME", "KAGGLE_KEY"), ("KAGGLE_KEY", "KAGGLE_USERNAME")])
def test_half_a_pair_of_variables_is_told_and_passed_over(kaggle, monkeypatch, given, other):
    monkeypatch.setenv(given, KEY)
    found = kaggle_credentials()
    assert found.source is None
    assert found.notes == (f"{given} is set and {other} is not: they count only together, so {given} was passed over.",)


@pytest.mark.parametrize("token", [f"{TOKEN} ", f'"{TOKEN}\t"', f"{TOKEN}\n{TOKEN}", f"“{TOKEN}”"])
def test_a_token_that_would_break_the_request_is_told_and_not_shown(kaggle, monkeypatch, token):
    monkeypatch.setenv("KAGGLE_API_TOKEN", token)
    with pytest.raises(StageError, match=r"Received: other characters in KAGGLE_API_TOKEN\nCopy them again") as caught:
        kaggle_credentials()
    assert TOKEN not in str(caught.value)


def test_a_token_too_long_to_be_a_path_is_told_and_not_shown(kaggle, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN * 30)
    try:
        assert kaggle_credentials().secrets == (TOKEN * 30,)  # Pythons that take it for a path that is not there
    except StageError as error:
        assert TOKEN not in str(error)
        assert "have KAGGLE_API_TOKEN name that file" in str(error).splitlines()[1]


def test_a_path_to_nothing_is_not_sent_as_a_token(kaggle, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", "/no/such/file")
    with pytest.raises(StageError, match="Received: the path of a file that is not there\nCorrect the path"):
        kaggle_credentials()


@pytest.mark.parametrize(
    "settings",
    [
        {"KAGGLE_API_ENVIRONMENT": "LOCALHOST", "http_proxy": "http://proxy.example:3128"},
        {"KAGGLE_API_ENVIRONMENT": "PROD", "KAGGLE_DATA_PROXY_URL": "http://proxy.example"},
    ],
)
def test_a_token_goes_nowhere_where_others_can_read_it(monkeypatch, settings):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StageError, match="must be an https address: a token goes there"):
        import_kagglehub()


def test_the_check_names_the_host_that_is_asked(kaggle):
    run = subprocess.run([warm.python(), *FETCH, "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout.startswith("source       kaggle (localhost)\n")


def test_colabs_store_which_is_asked_by_plain_http_gets_no_credentials(kaggle, tmp_path, monkeypatch):
    monkeypatch.setenv("TBE_RUNTIME_ADDR", kaggle.url.partition("//")[2])
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    command = [warm.python(), *FETCH, "--out-root", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert not any("kagglehub/models" in path for path in kaggle.requests)


def test_settings_that_print_headers_are_refused(monkeypatch):
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "TEST")
    with pytest.raises(StageError, match="Received: KAGGLE_API_ENVIRONMENT=TEST\nUnset it"):
        import_kagglehub()


def at_a_terminal(typed, *arguments):
    """Run the fetch with a terminal, type a line when it asks for a token, and return exit code and all it showed."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    run = subprocess.Popen(
        [sys.executable, *FETCH, *arguments],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown, answered = b"", False
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # Linux' way to say that nobody holds the other end any more
            break
        shown += block
        if b"Token (not shown" in shown and not answered:
            os.write(ours, typed.encode() + b"\n")
            answered = True
    os.close(ours)
    return run.wait(timeout=60), shown.decode()


def test_at_a_terminal_a_token_is_asked_for_and_used_for_this_run_only(kaggle, tmp_path, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE")
    kaggle.accepted = {f"Bearer {TOKEN}"}
    kaggle.statuses = [401]
    code, shown = at_a_terminal(TOKEN, "--out-root", str(tmp_path / "out"))
    assert code == 0, shown
    assert "No Kaggle credentials were found. An API token can be made at https://www.kaggle.com/settings/api." in shown
    assert TOKEN not in shown
    assert "model.weights.h5" in shown and "%|" in shown, shown
    assert kaggle.authorizations == {None, f"Bearer {TOKEN}"}
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert kept == []


def test_doing_without_ends_with_what_kaggle_answered(kaggle, tmp_path):
    kaggle.status = 403
    code, shown = at_a_terminal("", "--out-root", str(tmp_path / "out"))
    assert code == 1
    assert "it needs an account that accepted the license, and no credentials were found." in shown
