"""What comes from the Hub, and what goes wrong on the way."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor

import pytest

from stages.core.common.paths import MANIFEST
from stages.core.fetch.hub import explain
from stages.core.presets.manifest import verified_folder
from stages.core.records.manifest import License
from tests.support.hf_folder import hugging_face_files
from tests.support.hub_files import (
    ANOTHER_VOCABULARY,
    COMMIT,
    FOLDER,
    KERAS,
    LEFT_OUT,
    PLAIN,
    PRESET,
    REPO,
    SPLIT_KERAS,
    SPLIT_PLAIN,
    WEIGHTS,
)
from tests.support.repository import ROOT


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
    assert found.license == License("Gemma Terms of Use", "https://ai.google.dev/gemma/terms")
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
            f"Hugging Face answered 401 for {REPO}: it needs an account that accepted the license, and no token was",
            f"Accept it at https://huggingface.co/{REPO}, make a token at https://huggingface.co/settings/tokens",
        ),
        (
            "hf_other",
            {"gated": True},
            f"Hugging Face answered 403 for {REPO}: your account has not accepted the license, or",
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
    assert run.stderr.startswith(f"Error: {REPO} could not be downloaded from Hugging Face. Received: ")
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


def test_a_repository_with_the_weights_whole_and_in_parts_comes_whole(hub, fetch, manifest):
    hub.files = SPLIT_PLAIN | PLAIN
    run = fetch()
    assert run.returncode == 0, run.stderr
    assert {file.name for file in manifest().files} == {"config.json", "tokenizer.model", "model.safetensors"}
