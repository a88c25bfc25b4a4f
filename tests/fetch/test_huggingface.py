"""The fetch stage with huggingface_hub's real client, and a Hub on this machine."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from stages.core.common.errors import ParamsError, StageError
from stages.core.common.paths import MANIFEST
from stages.core.fetch.hub import source_of
from stages.core.presets.manifest import read_manifest, verified_folder
from stages.core.records.manifest import Licence
from tests.support.fake_preset import preset_files
from tests.support.hf_folder import config_of, hugging_face_files
from tests.support.repository import ROOT
from tests.support.servers import hub_server
from tests.support.tiny_presets import CONFIGS, tiny_proto

REPO = "google/gemma-tiny"
PRESET = f"hf://{REPO}"
COMMIT = "a" * 40
FOLDER = "presets/google--gemma-tiny-huggingface-" + "a" * 40
OTHERS = {
    ".gitattributes": b"",
    "README.md": b"# A model",
    "pytorch_model.bin": b"a pickle",
    "modeling_gemma.py": b"raise SystemExit",
}
PLAIN = OTHERS | hugging_face_files()
WEIGHTS = PLAIN["model.safetensors"]
SPLIT_PLAIN = OTHERS | hugging_face_files(files=2)
KERAS = {"README.md": b"# A preset", "task.json": b"{}"} | preset_files()
SHARDS = ["model_00000.weights.h5", "model_00001.weights.h5"]
SPLIT_KERAS = {"README.md": b"# A preset", "task.json": b"{}"} | preset_files(SHARDS)
SPLIT_KERAS["model.weights.json"] = json.dumps({"weight_map": {"/layers/a/vars": SHARDS}}).encode()
ANOTHER_VOCABULARY = tiny_proto(control=True)
LEFT_OUT = {".gitattributes", "README.md", "pytorch_model.bin", "modeling_gemma.py", "task.json"}


def named(text, endpoint):
    """Put the usual name for that of the server, in a message or a check."""
    return text.replace(f"{endpoint.partition('//')[2]} (HF_ENDPOINT)", "Hugging Face")


@pytest.fixture
def hub():
    with hub_server.serving(hub_server.Hub(REPO, dict(PLAIN), cardData={"license": "gemma"})) as running:
        yield running


@pytest.fixture
def fetch(hub, tmp_path):
    """Return a function that runs the stage as a person does, against the server and with an empty home."""

    def run(preset=PRESET, **environment):
        command = [sys.executable, "-m", "stages.fetch", "--out-root", tmp_path / "out"]
        command += ["--set", "fetch.source=huggingface", "--set", f"fetch.preset={preset}"]
        settings = hub_server.hub_environment(hub.url, tmp_path / "home")
        settings["GEMMA_TUNING_CACHE"] = str(tmp_path / "cache")
        environment = os.environ | settings | {key: str(value) for key, value in environment.items()}
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        run.stderr = named(run.stderr, environment["HF_ENDPOINT"])
        return run

    return run


@pytest.fixture
def ask(hub, tmp_path):
    """Return a function that calls one of the module's functions in such a process; it returns what came, or was said.

    The client reads its environment once, when it is imported.
    """

    def run(function, preset=PRESET, **environment):
        code = (
            "import dataclasses, json, sys; from pathlib import Path; from stages.core.common import errors\n"
            f"from stages.core.fetch.huggingface import {function}\n"
            f"try: print(json.dumps(dataclasses.asdict({function}({preset!r}, Path({str(tmp_path / 'cache')!r})))))\n"
            "except errors.StageError as error: print(json.dumps(str(error)))"
        )
        environment = os.environ | hub_server.hub_environment(hub.url, tmp_path / "home") | environment
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return json.loads(named(done.stdout, environment["HF_ENDPOINT"]))

    return run


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    """Return a function that reads the manifest that was written."""
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path / "cache"))
    return lambda: read_manifest(tmp_path / "out" / MANIFEST)


def everything_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize(
    "files, kind",
    [(PLAIN, "safetensors"), (SPLIT_PLAIN, "safetensors"), (KERAS, "keras"), (SPLIT_KERAS, "keras")],
    ids=["plain", "plain in parts", "keras-hub", "keras-hub in parts"],
)
def test_only_the_files_that_make_the_preset_come_pinned_to_a_commit(hub, fetch, manifest, tmp_path, files, kind):
    hub.files = files
    run = fetch(HF_TOKEN="hf_consented")
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    found = manifest()
    assert (found.preset, found.source, found.format) == (PRESET, "huggingface", kind)
    assert (found.handle, found.folder) == (f"hf://{REPO}@{COMMIT}", FOLDER)
    assert found.licence == Licence("Gemma Terms of Use", "https://ai.google.dev/gemma/terms")
    names = {file.name for file in found.files}
    assert names == set(files) - LEFT_OUT
    assert verified_folder(found, ROOT) == tmp_path / "cache" / FOLDER
    assert everything_below(tmp_path / "cache" / FOLDER) == names
    assert {name: (tmp_path / "cache" / FOLDER / name).read_bytes() for name in names} == {
        name: files[name] for name in names
    }
    assert not any(path.is_symlink() for path in (tmp_path / "cache").rglob("*"))
    assert run.stderr.splitlines()[0].startswith(f"Downloading {REPO} from Hugging Face: 0 MB in {len(names)} files.")
    for path in (tmp_path / "cache", tmp_path / "out"):
        for written in (path / name for name in everything_below(path)):
            assert b"hf_consented" not in written.read_bytes(), written
    assert "hf_consented" not in run.stderr
    assert str(tmp_path) not in (tmp_path / "out" / MANIFEST).read_text()


def test_a_full_cache_needs_no_network_and_keeps_the_commit_of_the_first_fetch(hub, fetch, tmp_path):
    assert fetch().returncode == 0
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    hub.branches["main"] = "b" * 40
    hub.asked.clear()
    assert fetch(HF_ENDPOINT="http://127.0.0.1:9").returncode == 0
    assert fetch(HF_HUB_OFFLINE="1").returncode == 0
    assert hub.asked == []
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before
    # The commit itself is the same preset under its exact name.
    assert fetch(f"{PRESET}@{COMMIT}", HF_HUB_OFFLINE="1").returncode == 0


def test_a_commit_that_only_begins_like_one_that_is_here_is_another(hub, fetch, ask):
    assert fetch().returncode == 0
    mistyped = COMMIT[:-1] + "b"
    run = fetch(f"{PRESET}@{mistyped}")
    assert run.returncode == 1
    assert f"has no revision {mistyped}." in run.stderr
    assert f"has no revision {mistyped}." in ask("architecture", f"{PRESET}@{mistyped}")


def test_a_revision_may_be_named_and_another_commit_lies_beside_the_first(hub, fetch, manifest):
    assert fetch().returncode == 0
    hub.branches["refs/pr/1"] = "b" * 40
    hub.files["tokenizer.model"] = ANOTHER_VOCABULARY
    run = fetch(f"{PRESET}@refs/pr/1")
    assert run.returncode == 0, run.stderr
    assert manifest().handle == f"hf://{REPO}@{'b' * 40}"
    verified_folder(manifest(), ROOT)
    assert fetch(HF_HUB_OFFLINE="1").returncode == 0
    verified_folder(manifest(), ROOT)


@pytest.mark.parametrize(
    "name, damage", [("model.safetensors", "lost"), ("model.safetensors", "altered"), ("config.json", "cut")]
)
def test_only_what_was_lost_or_altered_comes_again(hub, fetch, tmp_path, name, damage):
    assert fetch().returncode == 0
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    path = tmp_path / "cache" / FOLDER / name
    content = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + (b"?" if damage == "altered" else b""))
    hub.branches["main"] = "b" * 40
    hub.branches["first"] = COMMIT
    hub.downloaded.clear()
    run = fetch()
    assert run.returncode == 0, run.stderr
    assert hub.downloaded == [name]
    assert path.read_bytes() == content
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before


def test_clones_that_fetch_at_once_download_once(hub, fetch):
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda _: fetch(), range(3)))
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert sorted(hub.downloaded) == ["config.json", "model.safetensors", "tokenizer.model"]


def test_a_transfer_that_breaks_off_goes_on_where_it_was(hub, fetch, manifest):
    # The client writes ten megabytes at a time, and keeps what it has written.
    hub.files |= hugging_face_files(padding=12 << 20)
    hub.cut = 11 << 20
    run = fetch()
    assert run.returncode == 0, run.stderr
    assert hub.ranges == [f"bytes={10 << 20}-"]
    verified_folder(manifest(), ROOT)


def test_a_hub_that_is_busy_or_stumbles_is_asked_again(hub, fetch):
    hub.busy = hub.stumbles = 2
    run = fetch()
    assert run.returncode == 0, run.stderr
    assert len(run.stderr.splitlines()) == 2
    assert len([path for path in hub.asked if path.startswith("/api/models/")]) == 3


@pytest.mark.parametrize(
    "token, setting, first, second",
    [
        (
            "",
            {"gated": True},
            f"Hugging Face answered 401 for {REPO}: it wants an account that accepted the licence, and no token was",
            f"Accept it at https://huggingface.co/{REPO}, make a token at https://huggingface.co/settings/tokens",
        ),
        (
            "hf_other",
            {"gated": True},
            f"Hugging Face answered 403 for {REPO}: your account has not accepted the licence, or",
            f"Accept it at https://huggingface.co/{REPO}",
        ),
        (
            "hf_invalid",
            {},
            f"Hugging Face answered 401 for {REPO}: it does not accept the token from the environment variable HF_",
            "Make a new one at https://huggingface.co/settings/tokens",
        ),
        ("", {"repo": "other/model"}, f"Hugging Face answered 401: it has no model {REPO}. Or it is a private", "See "),
        (
            "hf_other",
            {"repo": "other/model"},
            f"Hugging Face answered 404: it has no model {REPO}.",
            f"See https://huggingface.co/{REPO}, and set fetch.preset.",
        ),
        ("", {"branches": {}}, f"Hugging Face answered 404: {REPO} has no revision main.", "See "),
        ("", {"status": 403}, f"Hugging Face answered 403 for {REPO}: access is forbidden.", "See "),
        ("", {"status": 429}, f"Hugging Face answered 429 for {REPO}, 4 times.", "Run this again later"),
        ("", {"status": 503}, f"Hugging Face answered 503 for {REPO}, 4 times.", "Run this again later"),
    ],
    ids=["no token", "no consent", "wrong token", "unknown", "unknown to me", "no revision", "403", "429", "503"],
)
def test_what_the_hub_refuses_is_said_in_two_lines(hub, fetch, tmp_path, token, setting, first, second):
    for key, value in setting.items():
        setattr(hub, key, value)
    run = fetch(HF_TOKEN=token)
    assert run.returncode == 1
    lines = [line for line in run.stderr.splitlines() if not line.startswith("Downloading")]
    assert lines[0].startswith(f"Error: {first}")
    assert lines[1].startswith(second)
    assert len(lines) == 2
    assert token not in run.stderr or not token
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_without_a_network_and_when_it_is_forbidden_it_is_said_so(fetch):
    run = fetch(HF_ENDPOINT="http://127.0.0.1:9")
    assert run.returncode == 1
    assert run.stderr.startswith(f"Error: {REPO} could not be had from Hugging Face. Received: ")
    assert len(run.stderr.splitlines()) == 2
    run = fetch(HF_HUB_OFFLINE="1")
    assert run.returncode == 1
    assert run.stderr.startswith(f"Error: {REPO} is not here whole, and HF_HUB_OFFLINE forbids asking Hugging Face.\n")


def test_other_bytes_than_announced_are_fetched_once_more_and_then_refused(hub, fetch, tmp_path):
    hub.altered["model.safetensors"] = WEIGHTS[:-1] + b"?"
    run = fetch()
    assert run.returncode == 1
    lines = run.stderr.splitlines()
    assert lines[1].startswith(f"Error: model.safetensors of {REPO} came from Hugging Face with other bytes")
    assert lines[2].startswith("Nothing of it was kept.")
    assert hub.downloaded.count("model.safetensors") == 2
    assert not (tmp_path / "cache" / FOLDER / "model.safetensors").exists()
    hub.altered.clear()
    hub.downloaded.clear()
    assert fetch().returncode == 0
    assert hub.downloaded == ["model.safetensors"]


def test_other_bytes_under_the_same_commit_are_not_accepted_in_silence(hub, fetch, tmp_path):
    assert fetch().returncode == 0
    (tmp_path / "cache" / FOLDER / "tokenizer.model").unlink()
    hub.files["tokenizer.model"] = ANOTHER_VOCABULARY
    run = fetch()
    assert run.returncode == 1
    assert f"tokenizer.model of {REPO} came from Hugging Face with other bytes than the first time" in run.stderr
    assert len(run.stderr.splitlines()) == 3


def test_a_model_whose_makers_mended_it_is_fetched_after_all(hub, ask, fetch, manifest):
    vocabulary = hub.files.pop("tokenizer.model")
    ask("architecture")
    assert fetch().returncode == 2
    hub.files["tokenizer.model"] = vocabulary
    hub.branches["main"] = "b" * 40
    run = fetch()
    assert run.returncode == 0, run.stderr
    assert manifest().handle == f"hf://{REPO}@{'b' * 40}"


def test_a_model_that_the_disk_cannot_hold_is_not_begun(hub, fetch):
    hub.sizes["model.safetensors"] = 10**15
    run = fetch()
    assert run.returncode == 1
    lines = run.stderr.splitlines()
    assert lines[0].startswith("Error: 1,000,000,000 MB are needed in ")
    assert lines[1].startswith("Make room, or set GEMMA_TUNING_CACHE")
    assert len(lines) == 2
    assert hub.downloaded == []


def test_a_disk_that_fills_up_on_the_way_and_a_folder_that_may_not_be_written_are_told(hub, fetch, tmp_path):
    from stages.core.fetch.hub import explain

    said = explain(OSError(errno.ENOSPC, "No space left on device"), REPO, None).splitlines()
    assert said[0] == f"The disk filled up while {REPO}'s folder was written (No space left on device)."
    assert said[1].startswith("Make room, or set GEMMA_TUNING_CACHE")
    lock = tmp_path / "cache" / "presets" / "google--gemma-tiny-huggingface.lock"
    lock.mkdir(parents=True)  # a lock that cannot be taken, even by root
    run = fetch()
    assert run.returncode == 1
    assert run.stderr.startswith("Error: The cache folder must be writable. Received: ")
    assert len(run.stderr.splitlines()) == 2
    assert hub.asked == []


def test_a_copy_in_hugging_faces_own_cache_is_taken_from_there(hub, fetch, tmp_path):
    blob = tmp_path / "home" / "huggingface" / "hub" / "models--google--gemma-tiny" / "blobs" / "weights"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(WEIGHTS)
    snapshot = blob.parents[1] / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blob)
    assert fetch().returncode == 0
    assert "model.safetensors" not in hub.downloaded
    ours = tmp_path / "cache" / FOLDER / "model.safetensors"
    assert not ours.is_symlink()
    assert ours.read_bytes() == WEIGHTS
    assert blob.read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"model_type": "llama"}, "model_type=llama"),
        ({"class_name": "LlamaBackbone", "config": {}}, "backbone=LlamaBackbone"),
        ({"class_name": "Gemma3Backbone", "config": {"vision_encoder": {}}}, "a Gemma with a vision encoder"),
        (config_of("gemma3", CONFIGS["gemma3"]) | {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ([], "config.json must be a JSON object"),
    ],
    ids=["another family", "another backbone", "vision", "embedding", "no configuration"],
)
def test_another_model_is_refused_before_its_weights_are_downloaded(hub, fetch, config, reason):
    hub.files["config.json"] = json.dumps(config).encode()
    run = fetch()
    assert run.returncode == 2
    lines = [line for line in run.stderr.splitlines() if not line.startswith("Downloading")]
    assert lines[0].startswith(f"Wrong setting: {REPO} is not a text Gemma that this project runs. Received: ")
    assert reason in lines[0]
    assert lines[1].startswith("Choose a text model of Gemma 1, 2 or 3")
    assert hub.downloaded == ["config.json"]


def changed_tensors(change, files=1):
    """The files of a plain checkpoint whose tensors are other ones."""
    from safetensors.numpy import load, save

    content = hugging_face_files(files)
    for name in [name for name in content if name.endswith(".safetensors")]:
        content[name] = save(change(load(content[name])))
    return content


def renamed(name):
    return lambda tensors: {name(key): value for key, value in tensors.items()}


UP = "model.layers.1.mlp.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj"
UNUSABLE = {
    "an unknown tensor": (
        changed_tensors(lambda tensors: tensors | {"score.weight": np.zeros((2, 64), "f4")}),
        "Received: score.weight in model.safetensors",
    ),
    "another shape": (
        changed_tensors(lambda tensors: tensors | {UP: np.zeros((64, 64), "f4")}),
        f"The tensor {UP} (for decoder_block_1/ffw_gating_2/kernel) must have the shape (128, 64) that config.json",
    ),
    "a tensor that is missing": (
        changed_tensors(lambda tensors: {key: value for key, value in tensors.items() if key != UP}),
        f"The weight files must hold {UP}",
    ),
    "codes": (
        changed_tensors(lambda tensors: tensors | {UP: np.zeros((128, 64), "i1")}),
        f"must be plain floats (F64, F32, F16, BF16), not quantized. Received: {UP} of I8",
    ),
    "an adapter": (
        changed_tensors(lambda tensors: tensors | {f"{QUERY}.lora_A.weight": np.zeros((4, 64), "f4")}),
        f"of a LoRA adapter that was not merged. Received: {QUERY}.lora_A.weight",
    ),
    "a wrapper": (
        changed_tensors(renamed(lambda name: f"module.{name}")),
        "Received: module.model.embed_tokens.weight, module.model.layers.0.input_layernorm.weight, ",
    ),
    "a tensor in two files": (
        changed_tensors(lambda tensors: tensors | {UP: np.zeros((128, 64), "f4")}, files=2),
        f"Each tensor must lie in one file. Received: {UP} in model-00002-of-00002.safetensors and in model-00001-of",
    ),
    "a missing shard": (
        {name: content for name, content in SPLIT_PLAIN.items() if name != "model-00002-of-00002.safetensors"},
        "must hold every file that model.safetensors.index.json names. Missing: model-00002-of-00002.safetensors",
    ),
    "an end that is missing": (PLAIN | {"model.safetensors": WEIGHTS[:-8]}, "bytes that its header states. Received: "),
    "no header": (
        PLAIN | {"model.safetensors": b"PK\x03\x04" + WEIGHTS},
        "must begin with the length of a safetensors",
    ),
    "another vocabulary": (
        changed_tensors(lambda tensors: tensors | {"model.embed_tokens.weight": np.zeros((1000, 64), "f4")})
        | {"config.json": json.dumps(config_of("gemma3", CONFIGS["gemma3"]) | {"vocab_size": 1000}).encode()},
        "as many pieces as its table has rows, or up to 255 fewer. Received: 512 pieces, 1,000 rows in google/gemma-ti",
    ),
}


@pytest.mark.parametrize(
    ("flaw", "how"),
    [*((flaw, "fetch") for flaw in UNUSABLE), ("another shape", "check"), ("a missing shard", "check")],
)
def test_what_could_not_be_used_is_refused_before_its_weights_are_downloaded(hub, fetch, ask, flaw, how):
    hub.files, reason = UNUSABLE[flaw]
    if how == "check":
        said = ask("check_huggingface")
    else:
        run = fetch()
        assert run.returncode == 2
        said = run.stderr.partition("Wrong setting: ")[2]
    assert said.startswith(REPO)
    assert reason in said
    assert 1 <= len(said.splitlines()) <= 2
    assert {name for name in hub.downloaded if name.endswith(".safetensors")} == set()


def test_a_preset_of_keras_hubs_with_another_vocabulary_is_refused_before_its_weights_are_downloaded(hub, fetch):
    config = json.loads(KERAS["config.json"])
    config["config"]["vocabulary_size"] = 1000
    hub.files = KERAS | {"config.json": json.dumps(config).encode()}
    run = fetch()
    assert run.returncode == 2
    assert "The vocabulary must be that of the model" in run.stderr
    assert "model.weights.h5" not in hub.downloaded


def test_a_hub_that_knows_no_ranges_sends_no_more_than_the_header_that_is_read(hub, ask):
    hub.knows_ranges = False
    hub.files = hugging_face_files(padding=300_000)
    assert ask("check_huggingface")["trouble"] is None
    # A header that is longer than what is read at first is asked for once more.
    assert hub.beginnings == ["model.safetensors"] * 2


def test_a_repository_with_the_weights_whole_and_in_parts_comes_whole(hub, fetch, manifest):
    hub.files = SPLIT_PLAIN | PLAIN
    run = fetch()
    assert run.returncode == 0, run.stderr
    assert {file.name for file in manifest().files} == {"config.json", "tokenizer.model", "model.safetensors"}


def test_what_the_hub_knows_of_the_model_is_enough_to_refuse_it(hub, fetch):
    hub.information["config"] = {"model_type": "gemma4"}
    run = fetch()
    assert run.returncode == 2
    assert run.stderr.startswith(f"Wrong setting: {REPO} is not a text Gemma (gemma, gemma2, gemma3_text, gemma3).")
    assert hub.downloaded == []


def test_a_repository_without_weights_or_vocabulary_is_refused(hub, fetch):
    del hub.files["tokenizer.model"]
    run = fetch()
    assert run.returncode == 2
    assert "tokenizer.model, the SentencePiece vocabulary" in run.stderr
    del hub.files["model.safetensors"], hub.files["pytorch_model.bin"]
    run = fetch()
    assert run.returncode == 2
    assert "must hold config.json with model.weights.h5 (keras-hub) or model.safetensors" in run.stderr


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "a PEFT adapter without its model"),
        ({"model-Q4_K_M.gguf": b""}, r"a GGUF file \(model-Q4_K_M\.gguf\)"),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, r"weights as a pickle \(pytorch_model\.bin\)"),
    ],
    ids=["adapter", "gguf", "pickle"],
)
def test_a_repository_of_something_else_is_said_to_be_what_it_is(files, what):
    from huggingface_hub.hf_api import ModelInfo

    from stages.core.fetch.huggingface import _needed

    info = ModelInfo(id=REPO, siblings=[{"rfilename": name} for name in files])
    with pytest.raises(ParamsError, match=rf"{REPO} must be a preset\. Received: {what}\n"):
        _needed(source_of(PRESET), info)


@pytest.mark.parametrize(
    "card, licence",
    [
        ({"license": "gemma"}, {"name": "Gemma Terms of Use", "url": "https://ai.google.dev/gemma/terms"}),
        (
            {
                "license": "other",
                "license_name": "health-ai-developer-foundations",
                "license_link": "https://developers.google.com/health-ai-developer-foundations/terms",
            },
            {
                "name": "Health AI Developer Foundations Terms of Use",
                "url": "https://developers.google.com/health-ai-developer-foundations/terms",
            },
        ),
        ({"license": "cc-by-4.0"}, {"name": "cc-by-4.0", "url": f"https://huggingface.co/{REPO}"}),
        (
            {"license": "other", "license_name": "mine", "license_link": "https://example.org/mine"},
            {"name": "mine", "url": "https://example.org/mine"},
        ),
        ({}, {"name": "terms on the model's page", "url": f"https://huggingface.co/{REPO}"}),
    ],
)
def test_the_licence_is_the_one_that_the_models_card_states(hub, card, licence):
    from huggingface_hub.hf_api import ModelInfo

    from stages.core.fetch.huggingface import _licence

    assert _licence(source_of(PRESET), ModelInfo(id=REPO, cardData=card)) == Licence(**licence)


def test_a_vision_model_of_keras_hubs_is_refused_by_its_name_alone():
    with pytest.raises(ParamsError, match=r"gemma3_4b has a vision tower(?s:.*)Its text preset is gemma3_4b_text"):
        source_of("hf://keras/gemma3_4b")


@pytest.mark.parametrize("preset", ["gemma3_1b", "hf://gemma", "hf://a/b/c", "hf://../b", "hf://a/b@", "hf://a--b/c"])
def test_a_handle_that_is_none_is_a_wrong_setting(preset):
    with pytest.raises(ParamsError, match=r"must be hf://owner/model or hf://owner/model@revision"):
        source_of(preset)


# Where a token may go


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

    from stages.core.fetch import hub

    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co")
    hub.import_hub.cache_clear()
    hub.import_hub()
    with pytest.raises(StageError, match=r"led to an address that is not https.* Received: host hub\.example\n"):
        get_session().send(httpx2.Request("GET", "http://hub.example/a", headers={"Authorization": "Bearer hf_a"}))
    assert hub.refuse_open_roads(httpx2.Request("GET", "http://hub.example/a")) is None


def test_the_host_that_is_asked_is_named(hub, fetch, tmp_path):
    host = hub.url.partition("//")[2]
    command = [sys.executable, "-m", "stages.fetch", "--check", "--set", "fetch.source=huggingface"]
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


# Asked before anything is downloaded


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
    from stages.core.config.reader import read_params
    from stages.core.config.schema import PlanStep
    from stages.core.plan.targets import architecture_of
    from stages.core.presets.hf_config import read_architecture

    asked = ask("architecture")
    assert hub.downloaded == ["config.json"]
    folder = tmp_path / "cache" / FOLDER
    assert asked == read_architecture(folder)
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
    from stages.core.config.reader import read_params
    from stages.core.config.schema import PlanStep
    from stages.core.fetch import catalog
    from stages.core.plan.targets import architecture_of

    params = read_params(
        ROOT / "params.yaml", ("fetch.source=huggingface", "fetch.preset=hf://keras/gemma3_instruct_1b")
    )
    assert architecture_of(params, PlanStep())[1] == catalog.architecture("gemma3_1b")
