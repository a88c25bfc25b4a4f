"""The plan compiles a step with the options that `finetune` compiles it with."""

from __future__ import annotations

import pytest

from stages.core.common.errors import StageError
from stages.core.plan import compilation
from stages.core.sharding import compiler_options
from tests.support.plans import request
from tests.support.tiny_runs import settings, train

UNKNOWN = {"no_such_option": "1"}


def test_what_is_set_for_a_chip_reaches_the_compiler_of_the_plan_and_of_the_run(presets, monkeypatch):
    monkeypatch.setitem(compiler_options.OPTIONS, "cpu", UNKNOWN)
    with pytest.raises(StageError, match="no_such_option"):
        compilation.compile_step(request(presets["gemma"], "cpu:8", batch_size=3))
    with pytest.raises(Exception, match="no_such_option"):
        train(presets["gemma"], settings(steps=1))


def test_the_tutorials_step_is_compiled_as_the_tutorial_does(presets, monkeypatch):
    monkeypatch.setitem(compiler_options.OPTIONS, "cpu", UNKNOWN)
    assert compilation.compile_step(request(presets["gemma"], "cpu:8", path="tutorial", batch_size=3)).fits
