"""Where a token may go, and what is asked before a download."""

from __future__ import annotations

import os
import subprocess
from dataclasses import asdict

import pytest

from stages.core.common.errors import StageError
from stages.core.config.plan import PlanStep
from stages.core.config.reader import read_params
from stages.core.fetch import catalog, hub
from stages.core.plan.targets import architecture_of
from stages.core.presets.hf_config import read_architecture
from tests.support import warm
from tests.support.hub_files import COMMIT, FOLDER, PLAIN, PRESET, REPO
from tests.support.repository import ROOT
from tests.support.servers import hub_server


@pytest.mark.parametrize(
    "endpoint", ["http://hub.example", "http://10.0.0.1:8080", "hub.example", "ftp://hub.example", "https://a:b#c@hub"]
)
def test_a_hub_where_others_could_read_the_token_is_not_asked(fetch, endpoint):
    run = fetch(HF_ENDPOINT=endpoint, HF_TOKEN="hf_consented")
    assert run.returncode == 1
    first, second = run.stderr.splitlines()
    assert first.startswith("Error: HF_ENDPOINT must be an ")
    assert second


def test_a_redirect_to_where_others_could_read_the_token_is_not_followed(monkeypatch):
    import httpx2
    from huggingface_hub.utils import get_session

    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co")
    hub.import_hub.cache_clear()
    hub.import_hub()
    with pytest.raises(StageError, match=r"led to an address that is not https.* Received: host hub\.example\n"):
        get_session().send(httpx2.Request("GET", "http://hub.example/a", headers={"Authorization": "Bearer hf_a"}))
    assert hub.refuse_open_roads(httpx2.Request("GET", "http://hub.example/a")) is None


def test_the_host_that_is_asked_is_named(hub, fetch, tmp_path):
    host = hub.url.partition("//")[2]
    command = [warm.python(), "-m", "stages.fetch", "--check", "--set", "fetch.source=huggingface"]
    environment = os.environ | hub_server.hub_environment(hub.url, tmp_path / "home")
    hub.status = 404
    run = subprocess.run(
        [*command, "--set", f"fetch.preset={PRESET}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.stderr.startswith(f"Error: {host} (HF_ENDPOINT) answered 404: ")
    hub.status = None
    run = subprocess.run(
        [*command, "--set", f"fetch.preset={PRESET}"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.stdout.startswith(f"source       huggingface ({host})\n"), run.stderr


FLAWS = ["\x0b", "\x0c", "\x7f", "\u201c"]


# No environment holds a zero byte, as UTF-16 has them.
@pytest.mark.parametrize(
    ("place", "flaw"),
    [*(("variable", flaw) for flaw in FLAWS), *(("file", flaw) for flaw in [*FLAWS, "\x00", "utf-16", "utf-16-le"])],
)
def test_a_token_of_other_characters_is_refused_and_not_shown(hub, fetch, tmp_path, place, flaw):
    token = "hf_aSentinel" if flaw.startswith("utf") else f"hf_aSen{flaw}tinel"
    content = token.encode(flaw if flaw.startswith("utf") else "utf-8")
    stored = tmp_path / "home" / "huggingface" / "token"
    stored.parent.mkdir(parents=True)
    if place == "file":
        stored.write_bytes(content)
    run = fetch(HF_TOKEN=content.decode() if place == "variable" else "")
    assert run.returncode == 1
    assert len(run.stderr.splitlines()) == 2
    assert ("HF_TOKEN" if place == "variable" else str(stored)) in run.stderr.splitlines()[0]
    assert "aSen" not in run.stderr.replace("\\x00", "") and "tinel" not in run.stderr
    assert hub.asked == []


def test_a_check_tells_who_one_is_what_was_agreed_to_and_what_it_would_cost(hub, ask, tmp_path):
    hub.gated = True
    check = ask("check_huggingface", HF_TOKEN="hf_consented")
    assert check.pop("free_bytes") > 1e6
    assert check == {
        "source": "huggingface",
        "preset": f"hf://{REPO}@{COMMIT}",
        "credentials": "the environment variable HF_TOKEN",
        "user": "somebody",
        "consent": True,
        "present": False,
        "download_bytes": sum(len(PLAIN[name]) for name in ("config.json", "model.safetensors", "tokenizer.model")),
        "notes": [],
        "host": hub.url.partition("//")[2],
        "trouble": None,
    }
    # Of the weights no more than the header was asked for.
    assert (sorted(hub.downloaded), hub.beginnings) == (["config.json", "tokenizer.model"], ["model.safetensors"])
    assert not (tmp_path / "cache").exists()


def test_a_check_finds_the_token_that_was_stored_and_that_consent_is_wanting(hub, ask, tmp_path):
    hub.gated = True
    stored = tmp_path / "home" / "huggingface" / "token"
    stored.parent.mkdir(parents=True)
    stored.write_text("hf_other\n")
    check = ask("check_huggingface")
    assert (check["credentials"], check["user"], check["consent"]) == (str(stored), "somebody else", False)
    stored.unlink()
    check = ask("check_huggingface")
    assert (check["credentials"], check["user"], check["consent"]) == (None, None, False)


def test_a_check_of_an_open_model_asks_for_no_consent_and_of_one_that_is_here_for_no_network(hub, fetch, ask):
    check = ask("check_huggingface")
    assert (check["consent"], check["present"]) == (None, False)
    assert fetch().returncode == 0
    for environment in ({}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        check = ask("check_huggingface", **environment)
        assert (check["present"], check["download_bytes"]) == (True, 0)


def test_a_check_says_what_is_wrong_as_a_fetch_does(hub, ask):
    assert ask("check_huggingface", HF_TOKEN="hf_wrong").startswith(
        f"Hugging Face answered 401 for {REPO}: it does not"
    )
    assert ask("check_huggingface", "hf://google/none").startswith("Hugging Face answered 401: it has no model google/")
    hub.information["config"] = {"model_type": "llama"}
    assert ask("check_huggingface").startswith(f"{REPO} is not a text Gemma")


def test_a_plan_needs_the_configuration_only(hub, ask, fetch, tmp_path, monkeypatch):
    asked = ask("architecture")
    assert hub.downloaded == ["config.json"]
    folder = tmp_path / "cache" / FOLDER
    assert asked == asdict(read_architecture(folder))
    # Now it is here, and the rest comes with the fetch.
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path / "cache"))
    params = read_params(ROOT / "params.yaml", ("fetch.source=huggingface", f"fetch.preset={PRESET}"))
    name, architecture = architecture_of(params, PlanStep())
    assert (name, architecture.config) == (PRESET, asked["config"])
    assert fetch().returncode == 0
    assert sorted(hub.downloaded) == ["config.json", "model.safetensors", "tokenizer.model"]
    (folder / "config.json").write_text("{}")
    assert ask("architecture") == asked


def test_a_plan_for_a_preset_of_the_registry_asks_nobody(monkeypatch):
    params = read_params(
        ROOT / "params.yaml", ("fetch.source=huggingface", "fetch.preset=hf://keras/gemma3_instruct_1b")
    )
    assert architecture_of(params, PlanStep())[1] == catalog.architecture("gemma3_1b")
