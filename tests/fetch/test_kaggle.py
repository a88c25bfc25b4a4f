"""Downloads from Kaggle by kagglehub's real client: what breaks off, what is not trusted, what needs no network."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.core.common.errors import ParamsError, StageError
from stages.core.common.paths import MANIFEST
from stages.core.fetch import kaggle_client
from stages.core.fetch.kaggle import _model_and_key, check_kaggle, fetch_kaggle
from stages.core.presets.manifest import fault
from tests.support import warm
from tests.support.fake_preset import weight_bytes
from tests.support.repository import ROOT
from tests.support.servers import kaggle_server
from tests.support.servers.kaggle_server import HANDLE

FETCH = ["-m", "stages.fetch", "--set", "fetch.source=kaggle", "--set", f"fetch.preset={HANDLE}"]
MODEL = "keras/tiny/keras/tiny_gemma/3"


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    with kaggle_server.for_this_process(tmp_path, monkeypatch) as running:
        yield running


@pytest.fixture
def fetch(tmp_path):
    """Return a function that fetches in this process."""
    return lambda: fetch_kaggle(HANDLE, tmp_path / "cache")


def files_of(manifest, tmp_path):
    folder = tmp_path / "cache" / manifest.folder
    return {file.name: (folder / file.name).read_bytes() for file in manifest.files}


@pytest.mark.parametrize("other", ["alice/tiny", "keras/medical"])
def test_models_that_share_variation_and_version_keep_apart(kaggle, tmp_path, other):
    cache = tmp_path / "cache"
    first = fetch_kaggle(HANDLE, cache)
    kaggle.files["model.weights.h5"] = weight_bytes(value=2.0)
    preset = f"kaggle://{other}/keras/tiny_gemma/3"
    assert not check_kaggle(preset, cache).present
    second = fetch_kaggle(preset, cache)
    assert files_of(second, tmp_path) == kaggle.files
    assert not any(fault(cache / first.folder, file) for file in first.files), "and the first is as it was"


NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,3}", fullmatch=True)
HANDLES = st.builds("kaggle://{}/{}/keras/{}/{}".format, NAMES, NAMES, NAMES, st.integers(min_value=1, max_value=99))


@given(HANDLES, HANDLES)
def test_each_handle_has_a_place_of_its_own_directly_below_the_presets(one, other):
    keys = {_model_and_key(handle)[1] for handle in (one, other)}
    assert len(keys) == len({one, other})
    assert all(Path("presets", key).parent == Path("presets") and not key.startswith(".") for key in keys)


@pytest.mark.parametrize("handle", ["kaggle://../tiny/keras/a/1", "kaggle://a/../keras/a/1", "kaggle://a/b/keras/../1"])
def test_a_handle_that_leads_out_of_the_cache_folder_is_a_wrong_setting(handle):
    with pytest.raises(ParamsError, match=r"kaggle://owner/model/keras/variation/version"):
        fetch_kaggle(handle, Path("nowhere"))


def test_when_kaggle_is_busy_it_is_asked_again_as_late_as_it_says(kaggle, fetch, tmp_path, logged):
    kaggle.statuses, kaggle.retry_after = [429, 503, 200, 500], "0"
    assert files_of(fetch(), tmp_path) == kaggle.files
    asked_again = [line for line in logged() if "asking again" in line]
    assert asked_again == [f"Kaggle answered {status}; asking again in 0 s." for status in (429, 503, 500)]


def test_without_a_time_of_kaggles_the_pauses_grow_and_end(kaggle, fetch, monkeypatch, logged):
    monkeypatch.setattr(kaggle_client, "BUSY_WAITS", (0.01, 0.02, 0.03))
    kaggle.status = 503
    with pytest.raises(
        StageError, match=rf"Kaggle answered 503 for {MODEL}\.\nRun `python -m stages\.fetch` again later"
    ):
        fetch()
    assert logged()[1:] == [f"Kaggle answered 503; asking again in {pause:g} s." for pause in (0.01, 0.02, 0.03)]
    assert len(kaggle.requests) == 4


def test_a_transfer_that_breaks_off_goes_on_where_it_was_as_often_as_it_gets_further(
    kaggle, fetch, tmp_path, monkeypatch
):
    monkeypatch.setattr(kaggle_client, "BROKEN_WAITS", (0.0, 0.0))
    kaggle.files["model.weights.h5"] = kaggle.files["model.weights.h5"].ljust(5 << 20, b"x")
    kaggle.cut = (1 << 20) + 7  # kagglehub writes by the megabyte
    assert files_of(fetch(), tmp_path) == kaggle.files
    # Each time kagglehub begins with a request for the whole file and then asks for the rest.
    begun = [begin for name, begin in zip(kaggle.asked, kaggle.ranges, strict=True) if name == "model.weights.h5"]
    assert [begin for begin in begun if begin] == [1 << 20, 2 << 20, 3 << 20, 4 << 20]


def test_a_run_that_is_killed_leaves_what_the_next_one_goes_on_with(kaggle, tmp_path):
    kaggle.files["model.weights.h5"] += os.urandom(6 << 20)
    kaggle.files = {"model.weights.h5": kaggle.files.pop("model.weights.h5"), **kaggle.files}
    out = ["--out-root", str(tmp_path / "out")]
    partial = tmp_path / "home" / "kagglehub" / "models" / MODEL / "model.weights.h5"
    kaggle.pause_seconds = 1.0
    run = subprocess.Popen([warm.python(), *FETCH, *out], cwd=ROOT, stderr=subprocess.PIPE)
    while not (partial.is_file() and partial.stat().st_size >= 2 << 20):
        assert run.poll() is None, run.stderr.read()
    run.send_signal(signal.SIGKILL)
    run.communicate()
    have = partial.stat().st_size
    assert have < 6 << 20
    assert not (tmp_path / "cache" / "presets" / "kaggle+keras+tiny+keras+tiny_gemma+3").exists()
    assert not (tmp_path / "out" / MANIFEST).exists()
    kaggle.pause_seconds = 0.0
    kaggle.ranges.clear()
    again = subprocess.run([warm.python(), *FETCH, *out], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert have in kaggle.ranges
    assert partial.read_bytes() == kaggle.files["model.weights.h5"]


def test_clones_that_fetch_at_once_download_once(kaggle, tmp_path):
    kaggle.pause_seconds = 0.1
    outs = [tmp_path / name for name in ("a", "b", "c")]
    runs = [
        subprocess.Popen([warm.python(), *FETCH, "--out-root", out], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for out in outs
    ]
    said = [run.communicate(timeout=60)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], said
    assert sorted(kaggle.asked) == sorted(kaggle.files)
    assert len({(out / MANIFEST).read_bytes() for out in outs}) == 1
    assert (
        sum("Another run is fetching kaggle+keras+tiny+keras+tiny_gemma+3; waiting for it." in each for each in said)
        == 2
    )


def test_a_model_of_many_files_comes_file_by_file_and_never_as_an_archive(kaggle, fetch, tmp_path):
    names = [f"model_{number:05}.weights.h5" for number in range(12)]
    kaggle.files |= {name: weight_bytes(len(names), number) for number, name in enumerate(names)}
    del kaggle.files["model.weights.h5"]
    index = {"weight_map": {f"/layers/{name}": name for name in names}}
    kaggle.files["model.weights.json"] = json.dumps(index).encode()
    kaggle.page = 5
    assert files_of(fetch(), tmp_path) == kaggle.files
    assert sorted(kaggle.asked) == sorted(kaggle.files)
    assert list((tmp_path / "home").rglob("*.archive")) == []


@pytest.mark.parametrize(
    "name", ["../../escaped.json", "/tmp/escaped.json", "a/../../escaped.json", "a//b.json", "a\\b.json"]
)
def test_a_name_that_leads_out_of_the_folder_is_refused_before_anything_is_downloaded(kaggle, fetch, tmp_path, name):
    kaggle.files[name] = b"{}"
    with pytest.raises(StageError, match=r"must have a plain name within the model's folder\. Received: "):
        fetch()
    assert kaggle.asked == []
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize("stranger", ["a link out", "a link to a folder outside", "a pipe"])
def test_links_out_of_the_folder_and_special_files_are_refused(kaggle, fetch, tmp_path, stranger):
    # As an archive may have left them that another program had kagglehub unpack.
    folder = tmp_path / "home" / "kagglehub" / "models" / MODEL
    for name, content in kaggle.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder.parent / "3.complete").touch()
    if stranger == "a pipe":
        os.mkfifo(folder / "pipe.json")
    else:
        (folder / "outside.json").symlink_to("/etc/passwd" if stranger == "a link out" else "/etc")
    with pytest.raises(StageError, match=r"must hold files only, and no link out of it\. Received: "):
        fetch()
    assert kaggle.requests == []
    assert not (tmp_path / "cache" / "presets" / "kaggle+keras+tiny+keras+tiny_gemma+3").exists()


def test_a_link_that_lies_in_wait_is_not_written_through(kaggle, fetch, tmp_path):
    folder = tmp_path / "home" / "kagglehub" / "models" / MODEL
    folder.mkdir(parents=True)
    (tmp_path / "precious").write_bytes(b"")
    (folder / "model.weights.h5").symlink_to(tmp_path / "precious")
    with pytest.raises(StageError, match=r"no link out of it\. Received: .*model\.weights\.h5\nDelete "):
        fetch()
    assert (tmp_path / "precious").read_bytes() == b""


def test_what_kagglehub_downloaded_for_another_program_is_not_downloaded_again(kaggle, fetch, tmp_path):
    import kagglehub

    kagglehub.model_download(MODEL)
    kaggle.requests.clear()
    assert files_of(fetch(), tmp_path) == kaggle.files
    assert kaggle.requests == []


def test_files_that_can_hold_a_pickle_are_not_even_downloaded(kaggle, fetch, tmp_path):
    wanted = dict(kaggle.files)
    for name in ("model.keras", "pytorch_model.bin", "weights.pkl", "extra.pt", "code.py", ".git/config.json"):
        kaggle.files[name] = b"cos\nsystem\n(S'touch executed'\ntR."
    assert files_of(fetch(), tmp_path) == wanted
    assert set(kaggle.asked) == set(wanted)


FOREIGN = {
    "another package": {"module": "os.path", "class_name": "GemmaBackbone", "config": {}},
    "another registered name": {"registered_name": "evil>GemmaBackbone", "class_name": "GemmaBackbone", "config": {}},
    "another class": {"module": "keras_hub.models", "class_name": "BertBackbone", "config": {}},
    "a function within": {"class_name": "GemmaBackbone", "config": {"a": [{"class_name": "__lambda__", "config": {}}]}},
    "a class within": {
        "class_name": "GemmaBackbone",
        "config": {"dtype": {"module": "evil", "class_name": "DTypePolicy", "config": {}}},
    },
    "no class at all": {"config": {}},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_configuration_that_names_foreign_classes_is_refused(kaggle, fetch, tmp_path, case):
    kaggle.files["config.json"] = json.dumps(FOREIGN[case]).encode()
    with pytest.raises(ParamsError, match=r"config\.json"):
        fetch()
    assert not (tmp_path / "cache" / "presets" / "kaggle+keras+tiny+keras+tiny_gemma+3").exists()


def test_an_index_that_leads_out_of_the_folder_is_refused(kaggle, fetch):
    del kaggle.files["model.weights.h5"]
    kaggle.files["model.weights.json"] = json.dumps({"weight_map": {"/layers/a": "../other.h5"}}).encode()
    with pytest.raises(ParamsError, match=r"must name files next to it\. Received: \.\./other\.h5"):
        fetch()


def test_a_disk_that_fills_up_is_told_in_two_lines(kaggle, tmp_path):
    kaggle.files["model.weights.h5"] += os.urandom(3 << 20)
    limited = ["sh", "-c", 'ulimit -f 2000 && exec "$@"', "sh"]  # one or two megabytes, as the shell counts
    run = subprocess.run(
        [*limited, sys.executable, *FETCH, "--out-root", tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 1
    first, second = run.stderr.splitlines()[-2:]
    weights = tmp_path / "home" / "kagglehub" / "models" / MODEL / "model.weights.h5"
    assert first == f"Error: The disk filled up while {weights} was written ({os.strerror(errno.EFBIG)})."
    assert second == "Make room, or set KAGGLEHUB_CACHE to a folder on a larger disk."


def test_a_download_that_would_fill_the_disk_is_not_begun(kaggle, fetch, tmp_path, monkeypatch):
    # A disk of its own, of one megabyte.
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        monkeypatch.setenv("KAGGLEHUB_CACHE", str(disk))
        kaggle.files["model.weights.h5"] += os.urandom(2 << 20)
        with pytest.raises(
            StageError, match=rf"2 MB are needed in .* for the weights of {MODEL}\. Received: free=1 MB\nMake room"
        ):
            fetch()
        assert kaggle.asked == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("variable", ["KAGGLEHUB_CACHE", "GEMMA_TUNING_CACHE"])
def test_a_cache_folder_that_is_not_writable_is_told_in_two_lines(kaggle, tmp_path, monkeypatch, variable):
    (tmp_path / "in the way").write_text("a file")
    monkeypatch.setenv(variable, str(tmp_path / "in the way" / "cache"))
    run = subprocess.run(
        [warm.python(), *FETCH, "--out-root", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1
    first, second = run.stderr.splitlines()[-2:]
    assert "cache folder must be writable. Received: " in first
    assert variable in second
    check = subprocess.run(
        [warm.python(), *FETCH, "--check", "--out-root", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True
    )
    assert check.returncode == 1
    assert check.stderr.splitlines()[-2].startswith("Error: The cache folder must be writable. Received: ")
    assert variable in check.stderr.splitlines()[-1]


def test_in_a_kaggle_notebook_the_model_is_attached_and_nothing_downloaded(kaggle, fetch, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setenv("KAGGLE_DATA_PROXY_URL", "http://proxy.localhost")
    monkeypatch.setenv("KAGGLE_USER_SECRETS_TOKEN", "a-token-of-the-notebook")
    monkeypatch.setenv("KAGGLE_DATA_PROXY_TOKEN", "another-token-of-the-notebook")
    monkeypatch.setenv("KAGGLE_CACHE_MOUNT_FOLDER", str(tmp_path))
    kaggle.mounted = "original"
    manifest = fetch()
    assert files_of(manifest, tmp_path) == kaggle.files
    assert kaggle.requests == ["http://proxy.localhost/kaggle-jwt-handler/AttachDatasourceUsingJwtRequest"]
    monkeypatch.setattr(kaggle, "status", 403)
    (tmp_path / "cache" / "presets" / "kaggle+keras+tiny+keras+tiny_gemma+3.json").unlink()
    with pytest.raises(StageError, match=r"Kaggle answered 403 for keras/tiny/keras/tiny_gemma/3: "):
        fetch()
    monkeypatch.delenv("KAGGLE_USER_SECRETS_TOKEN")
    with pytest.raises(
        StageError, match=r"kagglehub could not get keras/tiny/keras/tiny_gemma/3\. Received: A JWT Token"
    ):
        fetch()


def test_the_interrupt_of_a_download_is_heeded_at_once(kaggle, tmp_path):
    kaggle.pause_seconds = 5.0
    command = [
        "-c",
        "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "runpy.run_module('stages.fetch', run_name='__main__')",
    ]
    run = subprocess.Popen(
        [sys.executable, *command, *FETCH[2:], "--out-root", str(tmp_path / "out")], cwd=ROOT, stderr=subprocess.PIPE
    )
    assert kaggle.started.wait(30)
    ended = threading.Timer(4.0, run.kill)
    ended.start()
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=30)
    ended.cancel()
    assert run.returncode == 130
    assert errors.decode().endswith("Interrupted.\n")
