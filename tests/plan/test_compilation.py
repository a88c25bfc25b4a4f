"""TPUs that are not there, and answers that are kept."""

from __future__ import annotations

import dataclasses
import re

import pytest

from stages.core.common import code
from stages.core.common.errors import StageError
from stages.core.plan import compilation, topology
from tests.support.plans import cost, has_libtpu, request


@has_libtpu
@pytest.mark.parametrize("path", ["ours", "tutorial"])
def test_a_step_is_compiled_for_a_tpu_that_is_not_there(presets, path):
    found = compilation.compile_step(request(presets["gemma"], "v5e:2x4", path=path, dtype="bfloat16", batch_size=2))
    assert found.fits
    assert found.memory_bytes == 16 * 2**30
    assert 0 < found.bound.seconds == max(dataclasses.asdict(found.bound).values())
    assert sum(each.count for each in found.collectives.values()) > 0
    # Of this little nearly all is waiting for the network, but each part of the model takes some time.
    assert all(seconds > 0 for name, seconds in found.step_time if name != "other"), found.step_time
    assert found.estimated_seconds >= found.bound.seconds


@has_libtpu
def test_what_does_not_fit_is_an_answer_with_what_was_asked_for(presets):
    asked = request(presets["gemma"], "v5e:2x2", shape=(1, 4), batch_size=4096, length=4096)
    found = compilation.compile_step(asked)
    assert not found.fits
    assert found.needed_bytes > found.available_bytes > 15 * 2**30


def test_the_largest_buffers_are_taken_from_the_compilers_message():
    told = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of "
        "15.75G hbm. Exceeded hbm capacity by 4.75G.\n\nLargest program allocations in hbm:\n\n  1. Size: 2.00G\n"
        '     Operator: op_name="jit(step)/dot"\n     Shape: f32[8,64]{1,0}\n     Unpadded size: 2.00G\n'
        "\n  2. Size: 512.0M\n     Shape: bf16[4]{0}\n"
    )
    found = compilation._out_of_memory(told)
    assert (found["needed_bytes"], found["available_bytes"]) == (20.5 * 2**30, 15.75 * 2**30)
    assert found["largest"] == [
        {"bytes": 2**31, "shape": "f32[8,64]{1,0}", "operator": "jit(step)/dot"},
        {"bytes": 2**29, "shape": "bf16[4]{0}", "operator": ""},
    ]


def test_where_the_compiler_lists_no_buffers_those_of_two_blocks_tell_them(presets, monkeypatch):
    asked = request(presets["gemma"], "cpu:8")
    listed = compilation.compile_step(dataclasses.replace(asked, blocks=2)).largest
    sizes = [each.bytes for each in listed]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == compilation.LARGEST
    assert any("train_step" in each.operator for each in listed)
    gave_up = cost(fits=False, needed_bytes=2**40)
    large = asked.with_batch(2**20)
    compiled, size = compilation._compile, asked.step.settings.batch_size
    monkeypatch.setattr(
        compilation, "_compile", lambda q: gave_up if q.blocks is None else compiled(q.with_batch(size))
    )
    assert compilation.compile_step(large).largest == listed


def test_an_answer_is_kept_and_asked_for_only_once(presets, logged):
    asked = request(presets["gemma2"], "cpu:8", batch_size=2, learning_rate=0.011)
    first = compilation.compile_step(asked)
    assert compilation.compile_step(asked) == first
    assert len(logged()) == 1
    other = dataclasses.replace(asked.step, length=16)
    assert compilation.key_of(asked) != compilation.key_of(dataclasses.replace(asked, step=other))


def test_a_damaged_answer_is_noticed_and_made_anew(presets, tmp_path, monkeypatch, logged):
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path))
    made: list[int] = []
    monkeypatch.setattr(compilation, "_compile", lambda *_: made.append(1) or cost(needed_bytes=len(made)))
    asked = request(presets["gemma2"], "cpu:8")
    compilation.compile_step(asked)
    (file,) = (tmp_path / "plans").iterdir()
    whole = file.read_bytes()
    old = cost(needed_bytes=9).model_dump_json().encode()
    for damaged in (b"", whole[:-1], whole.replace(b"true", b"null"), old, b"\xff" + whole):
        file.write_bytes(damaged)
        assert compilation.compile_step(asked).needed_bytes == len(made)
        assert compilation.compile_step(asked).needed_bytes == len(made)
    assert len(made) == 6
    assert logged() == [f"Warning: the kept plan {file.name} is damaged; it is made anew."] * 5


def test_an_answer_that_cannot_be_kept_is_an_answer(presets, tmp_path, monkeypatch, logged):
    (tmp_path / "file").write_text("in the place of a folder")
    monkeypatch.setenv("GEMMA_TUNING_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(compilation, "_compile", lambda *_: cost())
    assert compilation.compile_step(request(presets["gemma2"], "cpu:8")) == cost()
    assert logged()[-1].startswith("Warning: the plan is not kept for later (Not a directory")


@pytest.mark.parametrize("changed", [{"learning_rate": 0.5}, {"seed": 7}, {"steps": 3}, {"sample_prompt": "It was"}])
def test_a_setting_that_shapes_no_program_is_compiled_only_once(presets, changed):
    asked = request(presets["gemma2"], "cpu:8", batch_size=2)
    other = request(presets["gemma2"], "cpu:8", batch_size=2, **changed)
    assert compilation.key_of(asked) == compilation.key_of(other)
    assert compilation.key_of(asked) != compilation.key_of(request(presets["gemma2"], "cpu:8", batch_size=3))


def test_the_key_covers_all_the_code_that_an_answer_follows_from(presets, monkeypatch):
    asked = request(presets["gemma2"], "cpu:8", batch_size=2)
    before = compilation.key_of(asked)
    digests = code.digests("stages/core/plan/compilation.py")
    needed = {"plan/step_program.py", "model/cross_entropy.py", "model/decoder.py"}
    assert {f"stages/core/{name}" for name in needed} <= set(digests)
    monkeypatch.setattr(code, "digests", lambda file: {**digests, "stages/core/model/cross_entropy.py": "other"})
    assert compilation.key_of(asked) != before


@has_libtpu
@pytest.mark.parametrize("name", ["v9:2x2", "v5e:3x5", "gpu:8", "cpu:0"])
def test_an_unknown_topology_is_told_with_those_that_exist(devices, name):
    with pytest.raises(StageError, match=re.escape(f"topology={name}")) as raised:
        topology.describe(name)
    assert "v5e:2x4" in str(raised.value) and "\n" not in str(raised.value)


def test_a_mesh_larger_than_the_topology_is_told(presets):
    with pytest.raises(StageError, match="has 4"):
        compilation.compile_step(request(presets["gemma"], "cpu:4", shape=(2, 4)))
