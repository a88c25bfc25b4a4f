"""A token that a run uses is in no file afterwards, and in no process's arguments while it runs."""

from __future__ import annotations

import ast
import base64
import os
import subprocess
import sys
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from stages.core.common import redaction
from stages.core.common.errors import StageError
from stages.core.fetch.wheels import _pip_environment, download_wheel
from tests.support import warm
from tests.support.copies import copy_repository, dvc, ran
from tests.support.repository import ROOT
from tests.support.sentinels import HF_TOKEN, KAGGLE_TOKEN, SENTINELS, ArgumentsWatcher, forms, leaks
from tests.support.servers import hub_server, kaggle_server, package_index
from tests.support.tiny_presets import tiny_reviews

REPO = "google/gemma-tiny"


@pytest.fixture
def run(one_block, tmp_path, monkeypatch):
    """A copy of the repository set to a tiny preset at Kaggle, with the tokens in its environment."""
    preset = one_block
    files = {path.relative_to(preset).as_posix(): path.read_bytes() for path in preset.rglob("*") if path.is_file()}
    (tmp_path / "repository").mkdir()
    repository = copy_repository(tmp_path / "repository")
    reviews = [review.replace("\n", " ") for review in tiny_reviews(24)]
    (repository / "reviews.txt").write_text("\n".join(reviews) + "\n")
    yaml = YAML()
    content = yaml.load((repository / "params.yaml").read_text())
    content["fetch"].update(source="kaggle", preset=kaggle_server.HANDLE)
    content["prepare"].update(source="files", train_file="reviews.txt", validation=4, min_characters=1)
    content["tokenize"].update(length=32)
    with (repository / "params.yaml").open("w") as stream:
        yaml.dump(content, stream)
    with kaggle_server.serving(kaggle_server.Kaggle(files)) as kaggle:
        environment = kaggle_server.kaggle_environment(kaggle.url, tmp_path / "home") | {
            "GEMMA_TUNING_CACHE": str(tmp_path / "cache"),
            "TMPDIR": str(tmp_path / "tmp"),
            "KAGGLE_API_TOKEN": KAGGLE_TOKEN,
            "HF_TOKEN": HF_TOKEN,
            # All that kagglehub has to say, into a file too.
            "KAGGLEHUB_VERBOSITY": "debug",
            "KAGGLE_LOGGING_ENABLED": "1",
            "KAGGLE_LOGGING_ROOT_DIR": str(tmp_path / "logs"),
        }
        (tmp_path / "tmp").mkdir()
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield repository, kaggle


def test_no_token_of_a_run_is_written_down_or_passed_on_and_only_fetch_uses_the_network(run, tmp_path):
    repository, kaggle = run
    with ArgumentsWatcher() as watcher:
        fetched = dvc(repository, "repro", "-v", "fetch")
        assert f"Bearer {KAGGLE_TOKEN}" in kaggle.authorizations, "the token was really used"
        kaggle.requests.clear()
        others = dvc(repository, "repro", "-v", "tokenize", "load")
    assert ran(others) == {"prepare", "tokenize", "quantize", "load"}
    assert kaggle.requests == [], "all that honours a proxy asks this server"
    assert any(b"stages.fetch" in each for each in watcher.seen)
    assert watcher.found == set()
    (tmp_path / "said.txt").write_text(fetched.stdout + fetched.stderr + others.stdout + others.stderr)
    assert (repository / "dvc.lock").is_file()
    assert list((tmp_path / "logs").rglob("kagglehub.log")), "kagglehub did write its log"
    assert leaks(tmp_path) == []


def test_the_search_finds_a_token_in_every_form(tmp_path):
    for number, form in enumerate(
        (KAGGLE_TOKEN, base64.b64encode(f"nobody:{KAGGLE_TOKEN}".encode()).decode(), f"Bearer {HF_TOKEN}\n")
    ):
        (tmp_path / str(number)).write_text(f"something {form} something")
    assert sorted(set(leaks(tmp_path))) == [str(tmp_path / str(number)) for number in range(3)]


def fetch_with(tmp_path, source, tokens, status=200):
    """Run the fetch with a traceback against both servers; return the exit code, and keep what it said."""
    environment = os.environ | {"GEMMA_TUNING_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hub")}
    environment |= {"KAGGLEHUB_VERBOSITY": "debug", "HF_HUB_VERBOSITY": "debug"}
    with (
        kaggle_server.serving(kaggle_server.Kaggle({"config.json": b"{}"})) as kaggle,
        hub_server.serving(hub_server.Hub(REPO, {"config.json": b"{}"})) as hub,
    ):
        hub.tokens[HF_TOKEN] = "somebody"
        kaggle.status, hub.status = status, None if status == 200 else status
        kaggle.retry_after = "3600"
        environment |= kaggle_server.kaggle_environment(kaggle.url, tmp_path / "home")
        environment |= {"HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"} | tokens
        preset = kaggle_server.HANDLE if source == "kaggle" else f"hf://{REPO}"
        command = [warm.python(), "-m", "stages.fetch", "-v", "--out-root", str(tmp_path / "out")]
        command += ["--set", f"fetch.source={source}", "--set", f"fetch.preset={preset}"]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    (tmp_path / "said.txt").write_text(result.stdout + result.stderr)
    assert "Traceback" in result.stderr
    return result.returncode


@pytest.mark.parametrize("status", [200, 401, 403, 500])
@pytest.mark.parametrize("source", ["kaggle", "huggingface"])
def test_no_token_is_shown_whatever_the_answer_even_with_a_traceback(tmp_path, source, status):
    assert fetch_with(tmp_path, source, {"KAGGLE_API_TOKEN": KAGGLE_TOKEN, "HF_TOKEN": HF_TOKEN}, status) in (1, 2)
    assert leaks(tmp_path) == []


@pytest.mark.parametrize("flaw", ["\x01", "\x0b", "\x0c", "\n", "\r\n x", "“"])
@pytest.mark.parametrize("source", ["kaggle", "huggingface"])
def test_a_token_that_breaks_the_request_is_not_shown_either(tmp_path, source, flaw):
    tokens = {"KAGGLE_API_TOKEN": KAGGLE_TOKEN + flaw + KAGGLE_TOKEN, "HF_TOKEN": HF_TOKEN + flaw + HF_TOKEN}
    assert fetch_with(tmp_path, source, tokens) == 1
    assert leaks(tmp_path) == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("source", ["kaggle", "huggingface"])
def test_a_token_stored_in_utf_16_is_refused_and_not_shown(tmp_path, source, encoding):
    stored = tmp_path.parent / f"{tmp_path.name}-token"
    stored.write_bytes((KAGGLE_TOKEN if source == "kaggle" else HF_TOKEN).encode(encoding))
    tokens = {"KAGGLE_API_TOKEN": str(stored), "HF_TOKEN_PATH": str(stored), "HF_TOKEN": ""}
    assert fetch_with(tmp_path, source, tokens) == 1
    assert leaks(tmp_path) == []
    assert "Received: " in (tmp_path / "said.txt").read_text()


def test_the_address_of_kaggles_storage_is_shown_without_its_signature(tmp_path, monkeypatch):
    with kaggle_server.for_this_process(tmp_path, monkeypatch) as kaggle:
        monkeypatch.setattr(kaggle, "hand_out", lambda request: request.send_error(403))
        command = [warm.python(), "-m", "stages.fetch", "-v", "--out-root", str(tmp_path / "out")]
        command += ["--set", "fetch.source=kaggle", "--set", f"fetch.preset={kaggle_server.HANDLE}"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert "Traceback" in run.stderr and "X-Goog" not in run.stderr and "?***" in run.stderr
    assert kaggle_server.SIGNATURE not in run.stdout + run.stderr


PASSWORD = "pass#w0rdOfNobody"


@pytest.mark.parametrize(
    "settings",
    [
        {"PIP_INDEX_URL": f"https://user:{PASSWORD}@host.invalid/simple"},
        {"PIP_INDEX_URL": "https://user:12#w0rdOfNobody@host.invalid/simple"},
        {"PIP_INDEX_URL": "https://user:w0rdOfNobody/pass@host.invalid/simple"},
        {"PIP_EXTRA_INDEX_URL": f"https://user:{PASSWORD}@host.invalid/simple"},
        {"PIP_PROXY": "http://me:w0rdOfNobody@host.invalid:notaport"},
        {"https_proxy": f"http://me:{PASSWORD}@host.invalid:1"},
        {"PIP_INDEX_URL": "http://user:w0rdOfNobody@127.0.0.1:9/simple"},
        {"PIP_CONFIG_FILE": "pip.conf", "PIP_INDEX_URL": None},
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_no_password_of_pips_addresses_is_shown(packed, tmp_path, settings, check):
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = https://user:{PASSWORD}@host.invalid/simple\n")
    environment = os.environ | settings | {"GEMMA_TUNING_CACHE": str(tmp_path / "cache")}
    if "PIP_CONFIG_FILE" in settings:
        environment["PIP_CONFIG_FILE"] = str(tmp_path / "pip.conf")
    environment = {name: value for name, value in environment.items() if value is not None}
    command = [warm.python(), "-m", "stages.fetch", "-v", "--out-root", str(tmp_path / "out")]
    command += ["--check"] if check else []
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    said = run.stdout + run.stderr
    assert "w0rd" not in said and "'pass'" not in said and "'12'" not in said and "port=12" not in said
    assert "must be an address" in said or "did not answer" in said


@pytest.mark.parametrize("status", [403, 404, 500])
def test_no_signature_of_a_package_is_shown_whatever_the_index_answers(tmp_path, monkeypatch, status):
    index = package_index.PackageIndex()
    wheel = index.add("some-data", "1.0", {"a.bin": b"content"})
    answer = index.answer

    def signed(request):
        if "sig=" in request.path:
            return index._send(request, status, b"no")
        return answer(request)

    names = list(index.files["some-data"])
    index.files["some-data"] = {f"{name}?sig=w0rdOfNobody": index.files["some-data"][name] for name in names}
    monkeypatch.setattr(index, "answer", signed)
    with package_index.serving(index):
        for name, value in package_index.pip_environment(index.url).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(StageError) as caught:
            download_wheel(wheel, tmp_path)
    assert str(status) in str(caught.value)
    assert "w0rd" not in str(caught.value)


def test_pip_gets_none_of_the_other_sources_credentials(monkeypatch):
    given = ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    for name in given:
        monkeypatch.setenv(name, "w0rdOfNobody")
    kept = _pip_environment()
    assert not kept.keys() & set(given) and kept.keys() >= {"PATH", "PYTHONUTF8"}


WORDS = st.text(st.characters(codec="ascii", categories=("L", "N")) | st.sampled_from("-_=+/\x0b\x00"), min_size=8)


@given(WORDS, st.text(max_size=4), st.text(max_size=4))
def test_a_remembered_secret_is_hidden_in_every_form(secret, before, after):
    redaction._remembered.clear()
    redaction.remember(secret)
    for form in (
        secret,
        quote(secret, safe=""),
        repr(secret.encode())[2:-1],
        secret.encode("utf-16-le").decode("utf-8"),
    ):
        assert form not in redaction.hide(f"{before} {form} {after}")
    encoded = base64.b64encode(f"{before}{secret}{after}".encode()).decode()
    for form in forms(secret)[1:4]:
        assert len(form) < 8 or form.decode() not in redaction.hide(encoded)
    redaction._remembered.clear()


@given(st.from_regex(r"[a-z#?@:/]{1,12}", fullmatch=True))
def test_an_address_either_gives_its_host_or_is_refused(password):
    try:
        assert redaction.host_of(f"https://user:{password}@host.example:1/simple") == "host.example:1"
    except ValueError as error:
        assert password not in str(error) or len(password) < 2


def test_the_filter_lets_all_else_pass():
    text = 'rules: {pattern: "ffw(?:_gating)?/kernel?"}; see https://a.example/b?*** what is // this? (?P<a>b)\n'
    assert redaction.hide(text) == text


def test_what_any_library_writes_to_standard_error_passes_the_filter():
    code = (
        "import logging, sys, warnings\nfrom stages.core.common.redaction import guard_standard_error\n"
        "guard_standard_error(); guard_standard_error()\n"
        f"address = 'https://me:{HF_TOKEN}@host/a?sig={KAGGLE_TOKEN}'\n"
        "warnings.warn(address); logging.warning(address); print(address, end='', file=sys.stderr)\n"
        "raise ValueError(address)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stderr.count("https://***@host/a?***") == 4
    assert not any(form.decode("latin-1") in run.stderr for form in SENTINELS)


# `export --verify` opens the folders that this stage wrote itself, by the libraries that users open them with.
VERIFYING = ROOT / "stages" / "core" / "export" / "verifying.py"


def test_nothing_in_the_stages_executes_or_unpickles_what_a_preset_holds():
    """No stage calls what could: a reader of pickles, an evaluator, or Keras' maker of objects from a configuration."""
    forbidden = {"eval", "exec", "deserialize_keras_object", "load_model", "unsafe_load", "from_preset", "extractall"}
    readers_of_pickles = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "torch"}
    for path in (ROOT / "stages").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert path == VERIFYING or not modules & readers_of_pickles, path
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                allowed = {"from_preset"} if path == VERIFYING else set()
                assert name not in forbidden - allowed, (path, node.lineno, name)
                assert not any(keyword.arg in ("allow_pickle", "trust_remote_code") for keyword in node.keywords), path
