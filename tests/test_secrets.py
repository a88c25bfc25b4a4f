"""A token that a run uses is in no file afterwards, and in no process's arguments while it runs."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests import hub_server, kaggle_server
from tests.copies import copy_repository, dvc, ran
from tests.sentinels import HF_TOKEN, KAGGLE_TOKEN, ArgumentsWatcher, leaks
from tests.tiny import tiny_reviews

ROOT = Path(__file__).parents[1]
REPO = "google/gemma-tiny"


@pytest.fixture
def run(presets, tmp_path, monkeypatch):
    """A copy of the repository set to a tiny preset at Kaggle, with the tokens in its environment."""
    preset = presets["gemma3"]
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
    assert ran(others) == {"prepare", "tokenize", "load"}
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
        command = [sys.executable, "-m", "stages.fetch", "-v", "--out-root", str(tmp_path / "out")]
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


@pytest.mark.parametrize("flaw", ["\x01", "\n", "\r\n x", "“"])
@pytest.mark.parametrize("source", ["kaggle", "huggingface"])
def test_a_token_that_breaks_the_request_is_not_shown_either(tmp_path, source, flaw):
    tokens = {"KAGGLE_API_TOKEN": KAGGLE_TOKEN + flaw + KAGGLE_TOKEN, "HF_TOKEN": HF_TOKEN + flaw + HF_TOKEN}
    assert fetch_with(tmp_path, source, tokens) == 1
    assert leaks(tmp_path) == []


def test_nothing_in_the_stages_executes_or_unpickles_what_a_preset_holds():
    """No stage calls what could: a reader of pickles, an evaluator, or Keras' maker of objects from a configuration."""
    import ast

    forbidden = {"eval", "exec", "deserialize_keras_object", "load_model", "unsafe_load", "from_preset", "extractall"}
    for path in (ROOT / "stages").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "torch"}, path
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                assert name not in forbidden, (path, node.lineno, name)
                assert not any(keyword.arg in ("allow_pickle", "trust_remote_code") for keyword in node.keywords), path
