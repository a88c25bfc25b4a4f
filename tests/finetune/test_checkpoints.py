"""Checkpoints of any size: written while steps go on, each value once, and read on another mesh."""

from __future__ import annotations

import json
import threading

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from stages.core.finetune import callback, checkpoint
from stages.core.finetune.checkpoint import Store
from stages.core.finetune.pieces import Piece, PieceFiles, write_pieces
from stages.core.finetune.trainer import other_layout
from tests.support.processes import Job
from tests.support.tiny_models import AUTO
from tests.support.tiny_runs import distance, settings, train

# Every weight is trained, the best are kept too, and the resumed steps begin within an epoch.
WANTED = settings(rank=0, steps=3, validate_every=1, early_stopping=9, checkpoint_every=2, epsilon=0.1)
OVER_BATCH = AUTO.model_copy(update={"shard_over_batch": "weights"})


@pytest.fixture(scope="module")
def interrupted(one_block, tmp_path_factory):
    """A run on the mesh (2, 4), weights over both axes, whose second step's checkpoint is written during the third."""
    begun = threading.Event()
    real_write, real_begin = checkpoint.write_pieces, callback.TrainingCallback.on_train_batch_begin
    waited = []

    def write(path, pieces):
        waited.append(begun.wait(60))
        return real_write(path, pieces)

    def begin(self, batch, logs=None):
        real_begin(self, batch, logs)
        if self.begun == 3:
            begun.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_TUNING_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(checkpoint, "write_pieces", write)
        patch.setattr(callback.TrainingCallback, "on_train_batch_begin", begin)
        store = Store("a-run", keep=2)
        result, weights = train(one_block, WANTED, shape=(2, 4), layout=OVER_BATCH, store=store)
        store._lock.release(force=True)
        assert waited == [True], "a step does not wait for the disk"
        yield store.folder, result, weights


def resumed(one_block, monkeypatch, folder, **options):
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(folder.parents[1]))
    store = Store(folder.name, keep=2)
    result, weights = train(one_block, WANTED, store=store, **options)
    store._lock.release(force=True)
    assert len(result.history.first_steps) == 2, "it went on"
    return result, weights


def test_a_full_state_goes_on_to_the_same_bytes(interrupted, one_block, monkeypatch):
    folder, _, whole = interrupted
    _, weights = resumed(one_block, monkeypatch, folder, shape=(2, 4), layout=OVER_BATCH)
    assert distance(weights, whole) == 0.0


def test_it_goes_on_on_another_mesh_to_float32_rounding(interrupted, one_block, monkeypatch):
    folder, result, whole = interrupted
    found, weights = resumed(one_block, monkeypatch, folder, shape=(1, 8))
    assert found.history.rows[-1].loss == pytest.approx(result.history.rows[-1].loss, rel=1e-5)
    assert distance(weights, whole) < 1e-5


def test_each_value_is_written_once_in_a_file_that_any_safetensors_reader_opens(interrupted):
    folder, _, whole = interrupted
    (path,) = folder.glob("step-*/arrays-*")
    count = sum(array.size for array in whole.values())
    found = load_file(path)
    # The weights, AdamW's two means and the best weights; the rest are a few counters.
    assert 4 * count <= sum(array.size for array in found.values()) < 4 * count + 10
    name = max(whole, key=lambda each: whole[each].size)
    parts = [array for key, array in found.items() if key.endswith(f":trained/{name}")]
    assert len(parts) == 8
    assert PieceFiles([path]).read(f"trained/{name}").shape == whole[name].shape


def test_a_slice_is_read_across_pieces_and_files(tmp_path):
    array = np.arange(48, dtype="f4").reshape(6, 8).astype(ml_dtypes.bfloat16)
    paths = []
    for number, rows in enumerate((slice(0, 4), slice(4, 6))):
        paths.append(tmp_path / f"{number}.safetensors")
        pieces = [Piece("a", (rows.start, at), array.shape, array[rows, at : at + 4]) for at in (0, 4)]
        write_pieces(paths[-1], [*pieces, Piece.of_all(f"n{number}", np.array(number, "i4"))])
    files = PieceFiles(paths)
    assert files.read("n1") == 1 and files.read("n1").shape == ()
    assert files.read("a").tobytes() == array.tobytes()
    assert files.read("a", (slice(3, 5), slice(2, 7))).tobytes() == array[3:5, 2:7].tobytes()
    with pytest.raises(ValueError, match="a is not there as a whole: 32 of 48 values"):
        PieceFiles(paths[:1]).read("a")


def test_another_layout_is_told_in_a_line_and_the_same_is_not():
    then = {"mesh": [2, 4], "processes": 2, "rules": {"name": "auto"}}
    assert other_layout(then, dict(then)) == ""
    told = other_layout(then, {**then, "mesh": [1, 8], "processes": 1})
    assert "(mesh [2, 4], layout auto, processes 2; now mesh [1, 8], layout auto, processes 1)" in told
    assert told.endswith(": equal to float32 rounding, not to the byte")


def kept_by(folder, count, *, steps=(), own_cache=(), **environment):
    """What each of some processes found and kept: small ones, see tests/support/keeping_process.py."""
    each = {number: {"environment": {"GEMMA_TUNING_CACHE": str(folder / f"own-{number}")}} for number in own_cache}
    environment |= {"GEMMA_TUNING_CACHE": str(folder), "STEPS": json.dumps(steps)}
    with Job(folder, "keeping_process", count=count, each=each, module="tests.support", **environment) as job:
        job.done()
        lines = [job.text(number).splitlines() for number in range(count)]
    return [json.loads(each[-1]) for each in lines], [line for each in lines for line in each[:-1]]


def test_processes_keep_and_find_checkpoints_of_any_number_of_them(tmp_path):
    told, said = kept_by(tmp_path, 2, steps=(1, 2, 3))
    assert told == [{"writers": 2, "step": None, "saved": 3}] * 2
    assert not said
    folder = tmp_path / "checkpoints/a-run"
    names = ["SHA256SUMS", "arrays-00000-of-00002.safetensors", "arrays-00001-of-00002.safetensors", "state.json"]
    assert {each.name: sorted(file.name for file in each.iterdir()) for each in folder.iterdir()} == {
        "step-00000002": names,
        "step-00000003": names,
    }

    # The second's part is damaged; then the disk of one of three is full, once.
    part = folder / "step-00000003" / names[2]
    part.write_bytes(part.read_bytes()[:-1] + b"\x55")
    (folder / ".writing-killed-00000004").mkdir()
    told, said = kept_by(tmp_path, 3, steps=(4, 5), DISK_FULL="2:4")
    found = {"writers": 3, "step": 2, "written by": 2, "state": {"rows": 2}, "values": [2.0], "saved": 5}
    assert told == [found] * 3
    assert len(said) == 2
    assert f"step-00000003 is damaged and not used ({names[2]} does not have its SHA-256)" in said[0]
    assert "the checkpoint after step 4 is not kept (File too large on process 2: " in said[1]
    assert sorted(each.name for each in folder.iterdir()) == ["step-00000002", "step-00000005"]

    # Of two that share no folder the first has all; alone it has all too.
    told, said = kept_by(tmp_path, 2, steps=(6,), own_cache=(1,))
    assert [each.pop("values") for each in told] == [[5.0], None]
    assert told == [{"writers": 1, "step": 5, "written by": 3, "state": {"rows": 5}, "saved": 6}] * 2
    assert not (tmp_path / "own-1").exists()
    told, said = kept_by(tmp_path, 1)
    assert (told[0]["step"], told[0]["values"], told[0]["written by"]) == (6, [6.0], 2)
    assert not said
