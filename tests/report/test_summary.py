"""The run in one line, for DVC's tables."""

from __future__ import annotations

import json

import pytest

from stages.core.common.paths import Paths
from stages.core.config.reader import read_params
from stages.core.report.inputs import read_inputs
from stages.core.report.summary import summary
from tests.support.pages import edit
from tests.support.report_outputs import plan, write_json


def content(root):
    return summary(read_inputs(Paths(root, root)), read_params(root / "params.yaml", ())).content()


def test_the_headline_figures_are_those_of_the_stages_to_four_digits(root):
    assert content(root) == {
        **{"perplexity_base": 31.43, "perplexity": 29.72, "loss_base": 3.448, "loss": 3.392, "accuracy": 0.3587},
        **{"trainable": 267264, "step_s": 1.87, "tokens_per_s": 131.4, "peak_gib": 3.3, "replicated": 0.0015},
    }


def test_a_further_variant_has_its_figures_beside(root):
    found = json.loads((root / "data/metrics/evaluate/tuned.json").read_text()) | {
        "loss": 3.12345,
        "perplexity": 22.7251,
    }
    write_json(root / "data/metrics/evaluate/mine.json", found)
    params = read_params(root / "params.yaml", ("variants={mine: adapters/mine, yours: adapters/yours}",))
    written = summary(read_inputs(Paths(root, root), params.variants), params).content()
    assert written.pop("variants") == {"mine": {"perplexity": 22.73, "loss": 3.123}}
    assert written == content(root)


@pytest.mark.parametrize("gone", ["evaluate/tuned", "finetune", "load"])
def test_what_is_not_known_yet_is_left_out(root, gone):
    whole = content(root)
    (root / f"data/metrics/{gone}.json").unlink()
    left = content(root)
    assert left.items() < whole.items()


def test_the_plan_of_this_run_is_told_as_the_fraction_of_the_chips_memory_that_it_needs(root):
    here = plan()["targets"]["here"]
    chip = {**here, "topology": "v5e:2x4", "needed_bytes_per_device": 4 * 2**30, "hbm_bytes_per_device": 16 * 2**30}
    small = {**chip, "topology": "v2:2x2", "hbm_bytes_per_device": 2**31, "fits": False}
    edit(root, "data/sharding/plan.json", targets={"here": here, "chip": chip})
    assert content(root)["plan_hbm"] == 0.25
    edit(root, "data/sharding/plan.json", targets={"here": here, "chip": chip, "small": small})
    assert content(root)["plan_hbm"] == 2.0
