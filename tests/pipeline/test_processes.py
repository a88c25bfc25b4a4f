"""Several processes of one run: the results of one, each reads its own part, and all end when one does."""

from __future__ import annotations

import csv
import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.processes import Job, free_port, tiny_project
from tests.support.tiny_presets import write_tiny_preset

pytestmark = pytest.mark.xdist_group("processes")
PROMPT = 60.0


@pytest.fixture(scope="module")
def untuned(devices: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny project."""
    base = tmp_path_factory.mktemp("processes")
    preset = write_tiny_preset(base / "preset", "gemma3", num_layers=1, num_key_value_heads=2)
    return tiny_project(base / "project", preset)


@pytest.fixture(scope="module")
def project(untuned: Path) -> Path:
    """The same, its model loaded and tuned by one process, into `alone`."""
    for stage in ("load", "finetune"):
        with Job(untuned, stage, "--out-root", str(untuned / "alone"), count=1) as job:
            job.done()
    return untuned


def losses(folder: Path) -> list[float]:
    with (folder / "data/plots/finetune.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def reason(job: Job, number: int) -> str:
    """The last thing that a process said."""
    return job.text(number).strip().splitlines()[-1]


def test_two_processes_train_what_one_does_with_the_model_axis_across_them(project: Path):
    shape = ["--set", "mesh.shape=[1, 4]"]
    out = ["--out-root", str(project / "two")]
    # As on a host with a disk of its own: the other has none of what `load` wrote, and writes nothing.
    read = project / "read"
    read.mkdir()
    own = project / "cache of its own"
    other = {1: {"arguments": ["--out-root", str(read)], "environment": {"GEMMA_TUNING_CACHE": str(own)}}}
    with Job(project, "load", *out, *shape) as job:
        job.done()
    with Job(project, "finetune", *out, "--set", "finetune.sample_every=4", each=other) as job:
        job.done()
    assert not any(read.iterdir())
    assert not list(own.glob("checkpoints/*")), "it sends its parts to process 0, whose folder it does not see"
    assert losses(project / "two") == pytest.approx(losses(project / "alone"), rel=2e-6)
    alone = load_file(project / "alone/models/tuned/adapter.safetensors")
    two = load_file(project / "two/models/tuned/adapter.safetensors")
    assert max(np.abs(alone[path] - two[path]).max() for path in alone) < 1e-5


def stopped_by_signal(
    project: Path, cache: str, count: int, victim: int = 0, command: tuple[str, str] = ("stages", "finetune")
) -> tuple[Job, Path]:
    """A long run that is told to stop when it has trained for a while, and its newest checkpoint."""
    module, stage = command
    long = ["--set", "finetune.steps=5000", "--set", "finetune.epochs=5000", "--out-root", str(project / "alone")]
    with Job(project, stage, *long, count=count, module=module, GEMMA_TUNING_CACHE=str(project / cache)) as job:
        job.until(0, "batch_loss")
        job.signal(victim, signal.SIGTERM)
        assert job.codes() == [143] * count
    return job, max((project / cache).glob("checkpoints/*/step-*"))


def curve_of(checkpoint: Path) -> list[float]:
    """The losses of a run until a checkpoint."""
    return [row["loss"] for row in json.loads((checkpoint / "state.json").read_text())["state"]["rows"]]


def test_two_processes_stop_after_the_same_step_one_goes_on_and_then_four(project: Path):
    _, alone = stopped_by_signal(project, "cache-alone", 1)
    # Steps are in flight when the signal comes, as on a chip.
    job, newest = stopped_by_signal(project, "cache", 2, victim=1, command=("tests.support", "steps_ahead"))
    steps = {re.search(r"after step (\d+) of", reason(job, number))[1] for number in (0, 1)}
    assert steps == {str(int(newest.name[5:]))}
    assert "SIGTERM to process 1 of 2" in reason(job, 0)
    assert len(list(newest.glob("arrays-*-of-00002.safetensors"))) == 2, "each wrote its own parts"
    for count in (1, 4):
        # The part of the second process, or the only one.
        part = max(newest.glob("arrays-*"))
        part.write_bytes(part.read_bytes()[:-1] + b"\x55")
        before = min(newest.parent.glob("step-*"))
        job, newest = stopped_by_signal(project, "cache", count)
        assert f"the checkpoint {part.parent.name} is damaged and not used ({part.name} does not" in job.text(0)
        assert f"Resuming from the checkpoint after step {int(before.name[5:])} of 5000, written on" in job.text(0)
        assert f"now mesh [2, 2], layout auto, processes {count}): equal to float32 rounding" in job.text(0)
    found, wanted = curve_of(newest), curve_of(alone)
    assert found[: len(wanted)] == pytest.approx(wanted[: len(found)], rel=1e-4)


def small(folder: Path, count: int = 2, **environment: str) -> Job:
    """Processes that share a small program instead of a model: the same start, watchdog and end, in seconds."""
    return Job(folder, "small_process", count=count, module="tests.support", **environment)


@pytest.mark.parametrize(
    ("which", "victim", "count"), [(signal.SIGKILL, 2, 3), (signal.SIGKILL, 0, 2), (signal.SIGSTOP, 1, 2)]
)
def test_a_process_that_is_killed_or_stopped_ends_the_others(
    tmp_path: Path, which: signal.Signals, victim: int, count: int
):
    with small(tmp_path, count) as job:
        job.until(victim, "five steps")
        job.signal(victim, which)
        codes = job.codes(besides=victim, seconds=PROMPT)
        others = [number for number in range(count) if number != victim]
        assert [codes[number] for number in others] == [1] * len(others)
        what = "stopped" if which == signal.SIGSTOP else "killed"
        for number in others:
            assert re.search(rf"process {victim} of {count} .*{what}", reason(job, number))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("raise:1", "process 1 of 3 .* ended: RuntimeError: a mistake of ours"),
        ("diverge:2", "process 2 of 3 .* ended: Training diverged: the loss is nan"),
        ("disk:0", "process 0 of 3 .* ended: OSError: .*No space left on device: 'adapter.safetensors'"),
        ("stuck:1", "process 1 of 3 .* is stuck, and the others wait for it: step 6 has not ended within 1 s"),
    ],
)
def test_a_process_that_fails_or_is_stuck_ends_the_others(tmp_path: Path, fault: str, said: str):
    victim = int(fault[-1])
    with small(tmp_path, 3, FAULT=fault) as job:
        codes = job.codes(seconds=PROMPT)
        assert codes == [1, 1, 1]
        for number in {0, 1, 2} - {victim}:
            assert re.search(said, job.text(number)), job.text(number)


def test_another_setting_on_one_process_is_named_before_anything_is_loaded(project: Path):
    each = {1: {"arguments": ["--set", "finetune.rank=4"]}}
    with Job(project, "finetune", "--out-root", str(project / "alone"), each=each) as job:
        assert job.codes() == [1, 1]
        for number in (0, 1):
            assert "the same the setting finetune.rank. Received: 4 on process 1 of 2" in job.text(number)


def test_a_process_that_waits_says_for_whom_and_ends_after_its_limit(untuned: Path):
    limit = ["--set", "mesh.join_timeout=3"]
    alone = {"environment": {"NUM_PROCESSES": "3"}}
    with Job(untuned, "load", "--out-root", str(untuned / "none"), *limit, each={0: alone, 1: alone}) as job:
        assert job.codes() == [1, 1]
        assert "within 3 s (mesh.join_timeout). Received: waits for 1 of 3 processes: 2; here: process 0" in job.text(0)
        assert "waits for 1 of 3 processes: 2" in job.text(1)
    assert not (untuned / "none").exists()


def test_a_launcher_starts_the_stage_and_is_started_once(untuned: Path, tmp_path: Path):
    launcher = tmp_path / "launch"
    launcher.write_text(
        "#!/bin/sh\nexport COORDINATOR_ADDRESS=localhost:$1 NUM_PROCESSES=2\nshift\n"
        'PROCESS_ID=1 "$@" & first=0; PROCESS_ID=0 "$@" || first=1; wait $! && exit $first\n'
    )
    launcher.chmod(0o755)
    copy = tmp_path / "project"
    copy.mkdir()
    for name in ("params.yaml", "reviews.txt", "data", "models"):
        (copy / name).symlink_to(untuned / name)
    command = f"mesh.launcher={launcher} {free_port()}"
    with Job(copy, "load", "--set", command, "--out-root", str(tmp_path / "out"), count=1) as job:
        job.done()
        assert "Starting load by mesh.launcher" in job.text(0)
        assert "2 processes have joined" in job.text(0)
    assert json.loads((tmp_path / "out/data/metrics/load.json").read_text())["devices"] == 4


def test_the_rehearsal_finds_the_losses_of_one_process(untuned: Path):
    with Job(untuned, "rehearse", "--processes", "2", "--devices", "2", "--steps", "2", count=1) as job:
        job.done(200)
        said = job.text(0)
    assert "tiny on tiny weights, mesh 2x2: 2 processes of 2 devices." in said
    assert "largest relative difference of a loss" in said
    assert "not rehearsed" in said
