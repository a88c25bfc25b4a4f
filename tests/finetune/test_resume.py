"""A run that is killed goes on from its last checkpoint and ends in the bytes of one that was left alone."""

from __future__ import annotations

import csv
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from ruamel.yaml import YAML

from stages.core.common import code
from stages.core.common.errors import StageError
from stages.core.common.paths import CURVE
from stages.core.finetune import resuming
from stages.core.finetune.checkpoint import Store
from stages.core.finetune.fingerprint import ENTRY, fingerprint_of, record, with_program
from stages.core.finetune.signals import Interruption, Stopped
from tests.support import warm
from tests.support.kept import keep
from tests.support.repository import QUICK, ROOT
from tests.support.tiny_presets import tiny_reviews

# Everything that a checkpoint has to carry: dropout, schedule, groups of batches, the best weights,
# several epochs, a batch axis.
SETTINGS = {
    "rank": 2,
    "epochs": 4,
    "batch_size": 4,
    "lora_dropout": 0.2,
    "schedule": "cosine",
    "warmup_steps": 3,
    "gradient_accumulation": 2,
    "learning_rate": 0.01,
    "validate_every": 4,
    "early_stopping": 50,
    "sample_every": 8,
    "sample_tokens": 4,
    "checkpoint_every": 3,
    "checkpoint_keep": 2,
}
ARRAYS_FILE = "arrays-00000-of-00001.safetensors"
WRITTEN = ("models/tuned/adapter.safetensors", "models/tuned/model.json", "data/plots/samples.jsonl")


class Trial:
    """A folder to run stages in, with a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python: str | None = None
        self.cache = folder / "cache"
        self.environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{QUICK}", "GEMMA_TUNING_CACHE": str(self.cache)}

    def start(self, stage: str, *arguments: str) -> subprocess.Popen[str]:
        command = [self.python or warm.python(), "-m", f"stages.{stage}", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, **pipes)

    def run(self, stage: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(stage, *arguments)
        out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def checkpoints(self) -> list[Path]:
        return sorted(self.cache.glob("checkpoints/*/step-*"))

    def stop_after_a_checkpoint(self, number: int) -> subprocess.CompletedProcess[str]:
        """Start finetune, and send a signal as soon as it has written a checkpoint beyond those there are."""
        before = set(self.checkpoints())
        process = self.start("finetune", "--out-root", "stopped")
        while not set(self.checkpoints()) - before:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def trial(one_block: Path, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """A tiny pipeline up to finetune, which has run once without being disturbed, into `whole`."""
    trial = Trial(tmp_path_factory.mktemp("resume"))
    (trial.folder / "reviews.txt").write_text("\n".join(review.replace("\n", " ") for review in tiny_reviews(14)))
    yaml = YAML()
    content = yaml.load((ROOT / "params.yaml").read_text())
    content["fetch"].update(source="path", preset="tiny", path=str(one_block))
    content["prepare"].update(source="files", train_file="reviews.txt", validation=4, min_characters=1)
    content["tokenize"].update(length=32)
    content["mesh"].update(shape=[2, 4])
    content["finetune"].update(SETTINGS)
    with (trial.folder / "params.yaml").open("w") as stream:
        yaml.dump(content, stream)
    for stage in ("fetch", "prepare", "tokenize", "load"):
        result = trial.run(stage)
        assert result.returncode == 0, result.stderr
    # By a new interpreter: the forked ones share the seed of their hashes.
    trial.python = sys.executable
    whole = trial.run("finetune", "--out-root", "whole")
    trial.python = None
    assert whole.returncode == 0, whole.stderr
    assert "Resuming" not in whole.stderr
    assert not trial.checkpoints(), "a run that ended well needs none"
    return trial


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(trial: Trial):
    killed = trial.stop_after_a_checkpoint(signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL

    terminated = trial.stop_after_a_checkpoint(signal.SIGTERM)
    assert "Resuming from the checkpoint after step 3 " in terminated.stderr
    assert terminated.returncode == 143, terminated.stderr
    assert terminated.stderr.strip().splitlines()[-1].startswith("Error: Stopped by SIGTERM after step ")
    assert "Traceback" not in terminated.stderr

    interrupted = trial.stop_after_a_checkpoint(signal.SIGINT)
    assert interrupted.returncode == 130, interrupted.stderr
    assert "resumes from there" in interrupted.stderr

    # Other settings are another run: it starts at its own beginning, and leaves this one's checkpoints alone.
    left = trial.checkpoints()
    other = trial.run("finetune", "--out-root", "other", "--set", "finetune.steps=1", "--set", "finetune.rank=1")
    assert other.returncode == 0, other.stderr
    assert "Resuming" not in other.stderr
    assert trial.checkpoints() == left

    assert len(left) == SETTINGS["checkpoint_keep"]
    written = [path for path in (trial.folder / "stopped").rglob("*") if path.is_file()]
    assert written == [trial.folder / "stopped" / CURVE], "nothing but the curve is written before the end"
    damaged = left[-1] / ARRAYS_FILE
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    last = trial.run("finetune", "--out-root", "stopped")
    assert last.returncode == 0, last.stderr
    assert f"the checkpoint {left[-1].name} is damaged" in last.stderr
    assert f"Resuming from the checkpoint after step {int(left[-2].name[5:])} " in last.stderr
    for name in WRITTEN:
        assert (trial.folder / "stopped" / name).read_bytes() == (trial.folder / "whole" / name).read_bytes(), name
    assert curve_without_speed(trial, "stopped") == curve_without_speed(trial, "whole")
    assert not trial.checkpoints()


def curve_without_speed(trial: Trial, name: str) -> list[list[str]]:
    with (trial.folder / name / "data/plots/finetune.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return [[value for key, value in row.items() if not key.endswith("_per_second")] for row in rows]


def test_a_loss_that_is_not_finite_leaves_what_an_earlier_run_wrote(trial: Trial):
    out = trial.folder / "diverged"
    shutil.copytree(trial.folder / "whole", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with np.load(trial.folder / "data/tokens/train.npz") as file:
        arrays = dict(file)
    arrays["weights"][arrays["review"] == 3] = np.inf
    (out / "data/tokens").mkdir(parents=True)
    np.savez(out / "data/tokens/train.npz", **arrays)
    result = trial.run("finetune", "--out-root", "diverged")
    assert result.returncode == 1
    assert "Training diverged: the loss is " in result.stderr
    assert "Traceback" not in result.stderr
    named = result.stderr.split("reviews=[")[1].split("]")[0]
    assert "3" in named.split(", ")
    assert {path: path.read_bytes() for path in before} == before
    shutil.rmtree(trial.cache / "checkpoints", ignore_errors=True)


def test_a_run_killed_at_any_moment_ends_in_the_same_bytes(trial: Trial):
    draw = random.Random(5)
    # A checkpoint after each step, so that many of the moments are within the writing of one.
    arguments = ("--out-root", "killed", "--set", "finetune.checkpoint_every=1")
    for _ in range(3):
        before = set(trial.cache.glob("checkpoints/*/*"))
        process = trial.start("finetune", *arguments)
        while process.poll() is None and set(trial.cache.glob("checkpoints/*/*")) <= before:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        process.kill()
        process.communicate()
    last = trial.run("finetune", *arguments)
    assert last.returncode == 0, last.stderr
    assert "damaged" not in last.stderr
    for name in WRITTEN:
        assert (trial.folder / "killed" / name).read_bytes() == (trial.folder / "whole" / name).read_bytes(), name
    assert not list(trial.cache.glob("checkpoints/*"))


def test_a_second_run_of_the_same_settings_waits_for_the_first_and_both_end_well(trial: Trial):
    runs = [trial.start("finetune", "--out-root", name) for name in ("first", "second")]
    ended = [process.communicate()[1] for process in runs]
    assert [process.returncode for process in runs] == [0, 0], ended
    assert (
        sum("Another run of the same settings, data and code is active; waiting for it." in err for err in ended) == 1
    )
    for name in WRITTEN:
        whole = (trial.folder / "whole" / name).read_bytes()
        assert (trial.folder / "first" / name).read_bytes() == (trial.folder / "second" / name).read_bytes() == whole


def test_a_cache_folder_that_cannot_be_written_to_costs_lines_and_never_the_run(trial: Trial, tmp_path: Path):
    (tmp_path / "file").write_text("in the place of a folder")
    environment = {**trial.environment, "GEMMA_TUNING_CACHE": str(tmp_path / "file" / "cache")}
    command = [warm.python(), "-m", "stages.finetune", "--out-root", "full"]
    result = subprocess.run(command, cwd=trial.folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    warnings = [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]
    assert "GEMMA_TUNING_CACHE" in warnings[0]
    assert any(
        line.startswith("Warning: the checkpoint after step 3 is not kept (Not a directory") for line in warnings
    )
    for name in WRITTEN:
        assert (trial.folder / "full" / name).read_bytes() == (trial.folder / "whole" / name).read_bytes(), name


# --- The store by itself. ---


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path))
    return Store("a-run", keep=2)


ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(7, np.int32)}


def test_what_was_saved_comes_back_and_only_the_newest_are_kept(store: Store, logged):
    for step in (5, 10, 15):
        keep(store, step, ARRAYS, {"rows": [{"loss": 0.1 + step}]})
    found = resuming.newest(store)
    assert logged() == []
    assert found.step == 15
    assert found.state == {"rows": [{"loss": 15.1}]}
    assert found.files.read("a").tobytes() == ARRAYS["a"].tobytes()
    assert found.files.read("n").shape == () and found.files.read("n") == 7
    assert [path.name for path in sorted(store.folder.iterdir())] == ["step-00000010", "step-00000015"]


def test_bfloat16_comes_back_as_bfloat16(store: Store, logged):
    array = np.arange(5, dtype=np.float32).astype(ml_dtypes.bfloat16)
    keep(store, 1, {"b": array})
    found = resuming.newest(store).files.read("b")
    assert logged() == []
    assert found.dtype == ml_dtypes.bfloat16
    assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("name", [ARRAYS_FILE, "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(store: Store, logged, name: str, damage: str):
    keep(store, 5, ARRAYS)
    keep(store, 10, ARRAYS)
    path = store.folder / "step-00000010" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        changed = (
            content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
        )
        path.write_bytes({"cut": content[:-3], "changed": changed, "empty": b""}[damage])
    assert resuming.newest(store).step == 5
    assert len(logged()) == 1 and "step-00000010 is damaged" in logged()[0]


def test_a_half_written_checkpoint_is_never_found_and_goes_with_the_rest(store: Store, logged):
    (store.folder / ".writing-abc").mkdir(parents=True)
    (store.folder / ".writing-abc" / ARRAYS_FILE).write_bytes(b"half")
    assert resuming.newest(store) is None
    assert logged() == []
    store.clear()
    assert not store.folder.exists()


def test_a_checkpoint_that_does_not_fit_leaves_the_ones_before(store: Store, logged):
    keep(store, 5, ARRAYS)
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        keep(store, 10, {"a": np.ones(10_000, "f4")})
        keep(store, 10, ARRAYS, {"rows": ["x" * 10_000]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    assert [path.name for path in store.folder.iterdir()] == ["step-00000005"]
    assert len(logged()) == 2
    assert all("the checkpoint after step 10 is not kept (File too large" in line for line in logged())
    assert resuming.newest(store).step == 5


CONTEND = """
import sys
import numpy as np
from stages.core.finetune import checkpoint, resuming
from stages.core.finetune.checkpoint import Store
from tests.support.kept import keep

resuming.logger.warning = checkpoint.logger.warning = sys.exit

for turn in range(15):
    store = Store("contended", keep=2)
    store.hold()
    assert resuming.newest(store) is None, "the run before ended well"
    for step in (1, 2, 3):
        keep(store, step, {"a": np.full(1000, step)}, {"turn": turn})
    assert resuming.newest(store).state == {"turn": turn}
    store.clear()
"""


def test_runs_of_one_fingerprint_never_disturb_each_other(store: Store):
    """Real processes, each holding, writing, reading and clearing the same folder again and again."""
    processes = [
        subprocess.Popen([sys.executable, "-c", CONTEND], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]
    told = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, told
    assert not list(store.folder.parent.iterdir())


def test_a_fingerprint_changes_with_every_part():
    parts = {"settings": {"rank": 4}, "tokens": "ab"}
    assert fingerprint_of(parts) == fingerprint_of({"tokens": "ab", "settings": {"rank": 4}})
    assert fingerprint_of(parts) != fingerprint_of({**parts, "tokens": "ac"})
    assert fingerprint_of(parts) != fingerprint_of({**parts, "settings": {"rank": 8}})


def test_the_fingerprint_holds_all_the_code_that_trains_and_none_that_only_talks():
    held = set(with_program({})["code"])
    trains = "finetune/trainer finetune/callback finetune/optimizer generate/sampling load/adapter model/causal_lm"
    trains += " model/cross_entropy model/decoder model/lora model/rotary model/tensor_parallel tokenize/batches"
    trains += " tokenize/chat"
    assert {f"stages/core/{name}.py" for name in trains.split()} <= held
    talks = ("cli", "common/progress", "common/paths", "preview/run_check")
    assert all((ROOT / f"stages/core/{name}.py").is_file() for name in talks)
    assert not held & {f"stages/core/{name}.py" for name in talks}
    assert held == code.dependencies(ENTRY)


def test_a_run_whose_code_changed_says_that_it_starts_over(tmp_path: Path, logged):
    parts = with_program({"settings": {"rank": 4}})
    changed = {**parts, "code": {**parts["code"], "stages/core/model/cross_entropy.py": "other"}}
    for each in (parts, changed):
        record(tmp_path / fingerprint_of(each), each)
    assert logged() == [], "nothing was kept that could not be used"
    (tmp_path / fingerprint_of(parts) / "step-00000005").mkdir()
    for other in ({**changed, "settings": {"rank": 8}}, parts):
        record(tmp_path / f"new-{other['settings']['rank']}", other)
    assert logged() == []
    record(tmp_path / "new", {**changed, "versions": {**parts["versions"], "jax": "0"}})
    assert len(logged()) == 1
    assert logged()[0].endswith(
        "other code or packages and are not used: jax, stages/core/model/cross_entropy.py changed."
    )


def test_a_killed_run_starts_over_when_the_training_code_changed_and_goes_on_when_a_help_text_did(trial: Trial):
    stages = trial.folder / "code" / "stages"
    shutil.copytree(ROOT / "stages", stages, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**trial.environment, "PYTHONPATH": f"{stages.parent}:{QUICK}"}
    killed = Trial(trial.folder)
    killed.environment = environment
    for number in (signal.SIGKILL, signal.SIGKILL):
        killed.stop_after_a_checkpoint(number)
    help_text = stages / "finetune.py"
    help_text.write_text(help_text.read_text().replace("Write a JAX profile", "Write a profile"))
    command_line = stages / "core/cli.py"
    command_line.write_text(command_line.read_text() + "\nCHANGED = 1\n")
    head = stages / "core/model/cross_entropy.py"
    head.write_text("# A comment.\n" + head.read_text())
    assert "Resuming from the checkpoint after step" in killed.stop_after_a_checkpoint(signal.SIGTERM).stderr
    head.write_text(head.read_text() + "\nCHANGED = 1\n")
    other = killed.run("finetune", "--out-root", "stopped")
    assert other.returncode == 0, other.stderr
    assert "Resuming" not in other.stderr
    assert "not used: stages/core/model/cross_entropy.py changed." in other.stderr
    assert sorted(file.read_bytes() for file in (trial.folder / "stopped/models/tuned").iterdir()) == sorted(
        file.read_bytes() for file in (trial.folder / "whole/models/tuned").iterdir()
    )
    shutil.rmtree(trial.cache / "checkpoints")


@pytest.fixture
def usual_signals():
    """What Python starts with; a shell's background jobs start with SIGINT ignored."""
    kept = {
        number: signal.signal(number, handler)
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL))
    }
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_a_first_signal_is_noted_and_a_second_acts(usual_signals):
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert isinstance(Stopped("x", signal.SIGTERM), StageError)
    assert Stopped("x", signal.SIGTERM).exit_code == 143
