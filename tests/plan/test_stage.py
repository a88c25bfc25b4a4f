"""The stage, its search, the table of all presets, and what a run says of its plan."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
from types import SimpleNamespace

import pytest

from stages.core.common.errors import ParamsError, StageError
from stages.core.common.paths import PLAN
from stages.core.config.plan import PlanScaling, PlanSearch, PlanTarget
from stages.core.config.reader import read_params
from stages.core.fetch import catalog
from stages.core.files import write_json
from stages.core.plan import compilation, presets_table, published, search, targets, topology
from stages.core.plan.chips import CHIPS
from stages.core.plan.search import _worth
from stages.core.preview import run_check
from stages.core.preview.run_check import warn_if_planned_not_to_fit
from stages.core.records.plan import Estimate, PlanFile, RunKey, Target
from tests.support import tiny_models, warm
from tests.support.declared import architecture
from tests.support.plans import has_libtpu, plan_settings, request
from tests.support.repository import QUICK, ROOT
from tests.support.tiny_models import open_tiny


def test_an_unknown_preset_is_told_with_the_nearest(devices):
    params = read_params(ROOT / "params.yaml")
    with pytest.raises(ParamsError, match="gemma_7b_en"):
        targets.compile_request_of(params, PlanTarget(topology="cpu:8", preset="gemma_7b"))
    assert catalog.architecture("gemma_7b_en").class_name == "GemmaBackbone"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"targets": [PlanTarget(topology="cpu:8", preset="gemma_7b")]}, "gemma_7b_en"),
        ({"search": PlanSearch(topology="cpu:8", preset="gemma_7b")}, "gemma_7b_en"),
        ({"search": PlanSearch(topology="v9:2x2")}, "topology=v9:2x2"),
        ({"scaling": PlanScaling(topologies=["cpu:8"], preset="gemma_7b")}, "gemma_7b_en"),
        ({"scaling": PlanScaling(topologies=["cpu:8", "v9:2x2"])}, "topology=v9:2x2"),
    ],
)
def test_a_wrong_name_is_told_before_anything_is_compiled(devices, asked, said):
    params = read_params(ROOT / "params.yaml")
    right = {"targets": [PlanTarget(topology="cpu:8")]}
    plan = params.plan.model_copy(update={"search": None, "scaling": None, **right, **asked})
    with pytest.raises((ParamsError, StageError), match=said):
        targets.check(params.model_copy(update={"plan": plan}))
    targets.check(params.model_copy(update={"plan": params.plan.model_copy(update=right)}))


def test_a_target_may_name_layers_of_its_own_for_the_adapter(devices):
    params = read_params(ROOT / "params.yaml")
    own, other = (
        targets.compile_request_of(params, PlanTarget(topology="cpu:8", lora_targets=named))[1].step
        for named in (None, ["query", "value"])
    )
    assert (own.settings.targets, other.settings.targets) == (params.finetune.targets, ["query", "value"])
    keys = [targets.run_key("gemma3_270m", step) for step in (own, other)]
    assert [key.lora_targets for key in keys] == [params.finetune.targets, ["query", "value"]]
    assert not keys[0].matches(keys[1]), "a plan with other layers is no plan of this run"


RULES = [{"pattern": "token_embedding/embeddings", "spec": ["model", None]}]


def test_a_target_may_have_rules_of_its_own(devices):
    params = read_params(ROOT / "params.yaml")
    wanted = PlanTarget(topology="cpu:8", layout="rules", rules=RULES)
    name, asked = targets.compile_request_of(params, wanted)
    assert [(rule.pattern, rule.spec) for rule in asked.step.layout.rules] == [(RULES[0]["pattern"], ("model", None))]
    key = targets.run_key(name, asked.step)
    assert key.rules == [("token_embedding/embeddings", ["model", None])]
    other = PlanTarget(topology="cpu:8", layout="rules", rules=[{**RULES[0], "spec": [None, "model"]}])
    assert not key.matches(targets.run_key(name, targets.compile_request_of(params, other)[1].step))


@pytest.mark.parametrize("wanted", [{"layout": "rules"}, {"layout": "auto", "rules": RULES}, {"rules": RULES}])
def test_rules_go_with_the_layout_of_that_name(wanted):
    with pytest.raises(ValueError, match="rules must be given with layout: rules"):
        PlanTarget(topology="cpu:8", **wanted)


def test_a_price_of_a_chip_that_no_topology_has_is_told(devices):
    params = read_params(ROOT / "params.yaml", ("plan.price_per_chip_hour={v5e: 1.2, v5litepod: 1.3}",))
    with pytest.raises(ParamsError, match=r"price_per_chip_hour must name chips .*v5e.*Received: v5litepod"):
        targets.prices(params.plan)


def test_no_published_step_is_faster_than_its_lower_bound():
    """The table in the guide, as the command wrote it."""
    text = (ROOT / "docs/planning.md").read_text()
    lines = text.partition(published.BEGIN)[2].partition(published.END)[0].strip().splitlines()[2:]
    assert [line.split("](")[1].split(")")[0] for line in lines] == [each.source for each in published.PUBLISHED]
    for line, step in zip(lines, published.PUBLISHED, strict=True):
        cells = [cell.split() or ["0"] for cell in line.split("|")[3:6]]
        bound, expected, measured = (float(cell[0].replace(",", "")) for cell in cells)
        assert measured == pytest.approx(step.seconds * 1e3)
        assert 0 < bound < measured
        if step.target["topology"].startswith("v"):
            assert bound <= expected


def test_the_table_of_published_steps_needs_its_marks(tmp_path):
    (tmp_path / "a.md").write_text(presets_table.BEGIN)
    with pytest.raises(ParamsError, match="--published needs a file with the marks"):
        published.write_table(plan_settings(), tmp_path / "a.md")


def test_the_stage_writes_metrics_search_and_scaling_the_same_each_time(presets, tmp_path):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    overrides = [
        "fetch.source=path",
        f"fetch.path={presets['gemma3']}",
        "plan.targets=[{topology: 'cpu:8', mesh: [2, 4], rank: 2, batch_size: 4, length: 32}]",
        "plan.search={topology: 'cpu:2', length: 32, largest_batch: 2}",
        "plan.scaling={topologies: ['cpu:4', 'cpu:8'], model_axis: 4, batch_per_row: 2, length: 32}",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{QUICK}"}

    def run() -> subprocess.CompletedProcess[str]:
        command = [warm.python(), "-m", "stages.plan"]
        for override in overrides:
            command += ["--set", override]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    first = run()
    assert first.returncode == 0, first.stderr
    written = (tmp_path / "data/sharding/plan.json").read_bytes()
    content = json.loads(written)
    entry = next(iter(content["targets"].values()))
    assert entry["fits"] and entry["devices"] == 8 and entry["rank"] == 2
    found = content["search"]["candidates"]
    assert {tuple(each["mesh"]) for each in found} == {(1, 2), (2, 1)}
    assert all(each["largest_batch"] == 2 for each in found), "a CPU device's memory is not bounded here"
    assert [each["devices"] for each in content["scaling"]["rows"]] == [4, 8]
    assert [each["batch_size"] for each in content["scaling"]["rows"]] == [2, 4]
    again = run()
    assert (tmp_path / "data/sharding/plan.json").read_bytes() == written
    assert "Compiling" in first.stderr and "Compiling" not in again.stderr
    assert "Traceback" not in first.stderr + again.stderr


def test_the_best_candidate_is_the_fastest_and_of_equals_the_one_that_sends_least():
    def row(name: str, tokens: float | None, wire: int, batch: int) -> Estimate:
        known = {"tokens_per_second_upper_bound": tokens, "interconnect_bytes": wire, "batch_size": batch}
        return Estimate(name=name, mesh=[1, 8], layout="auto", fits=True, **known)

    rows = [row("slow", 40_000.0, 1, 8), row("talks", 45_076.0, 900, 32), row("quiet", 45_071.0, 100, 16)]
    rows += [Estimate(name="does not fit", mesh=[1, 8], layout="auto", fits=False)]
    best_first = [each.name for each in sorted(rows, key=_worth, reverse=True)]
    assert best_first == ["quiet", "talks", "slow", "does not fit"]
    speeds = zip(rows[:3], (3e4, 1e4, 2e4), strict=True)
    estimated = [row.model_copy(update={"tokens_per_second": speed}) for row, speed in speeds]
    assert [each.name for each in sorted(estimated, key=_worth, reverse=True)] == ["slow", "quiet", "talks"]


@pytest.mark.parametrize(
    ("peaks", "wanted"), [({2: 3, 4: 4}, 16), ({2: 5, 4: 3, 8: 8}, 18), ({2: 5, 4: 4, 8: 3, 16: 2, 28: 1}, 1)]
)
def test_memory_is_extrapolated_from_the_fewest_blocks_and_as_many_as_need_more(presets, monkeypatch, peaks, wanted):
    def compile_step(request):
        none = dict.fromkeys(search.EXTRAPOLATED, 0)
        known = {"devices": 8, "device_kind": "", "chips": 8, "parameters": 0, "trainable_parameters": 0}
        known |= {"memory_bytes": None, "by_kind": {"batch": 0}, "weights": [], "fits": True, "compile_seconds": 0.0}
        return compilation.StepCost(**known, **none | {"temporary_bytes": peaks[request.blocks] * 2**30})

    monkeypatch.setattr(search, "compile_step", compile_step)
    step = request(presets["gemma"], "cpu:8", shape=(1, 8)).step
    whole = dataclasses.replace(step, architecture=catalog.architecture("gemma_7b_en"))
    found = search.estimate_step(compilation.CompileRequest(whole, "cpu:8"), topology.describe("cpu:8"), 0)
    assert found.temporary_bytes == wanted * 2**30


@pytest.mark.parametrize("per_sequence", [0.01, 0.3, 0.9, 1.0, 3.0, 13.0, 20.0])
def test_the_largest_batch_is_found_and_what_surely_does_not_fit_is_not_compiled(presets, monkeypatch, per_sequence):
    asked = []

    def estimate_step(request, topology, held):
        batch = request.step.settings.batch_size
        asked.append(batch)
        needed = round((1.5 + per_sequence * batch) * 2**30)
        fits = needed <= topology.memory_bytes
        return Estimate(mesh=[1, 8], layout="auto", batch_size=batch, fits=fits, needed_bytes=needed)

    monkeypatch.setattr(search, "estimate_step", estimate_step)
    wanted = request(presets["gemma"], "v5e:2x4", shape=(1, 8))
    place = dataclasses.replace(topology.describe("cpu:8"), chip=CHIPS["v5e"])
    tried, best = search._largest_batch(wanted, place, 512)
    fitting = [2**power for power in range(10) if 1.5 + per_sequence * 2**power <= 16]
    assert best.largest_batch == max(fitting, default=0)
    assert best.fits == bool(fitting)
    assert len(asked) == len(set(asked)) == len(tried) <= 4
    if per_sequence == 0.3:
        assert len(asked) == 2, "two batches give the line, the others are foreseen"


@has_libtpu
def test_the_table_of_presets_takes_the_first_topology_that_holds_the_step(tmp_path, monkeypatch, devices):
    tiny = {**architecture("gemma3_270m").config, "num_layers": 6, "hidden_dim": 64, "intermediate_dim": 128}
    monkeypatch.setattr(catalog, "GEMMAS", {"gemma3_270m": {**tiny, "vocabulary_size": 512, "head_dim": 32}})
    monkeypatch.setattr(presets_table, "LENGTH", 64)
    params = plan_settings()
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{presets_table.BEGIN}\nold\n{presets_table.END}\nafter\n")
    presets_table.write_table(params, readme)
    lines = readme.read_text().splitlines()
    assert (lines[0], lines[1], lines[-2], lines[-1]) == ("before", presets_table.BEGIN, presets_table.END, "after")
    cells = [cell.strip() for cell in lines[4].split("|")[1:-1]]
    assert cells[0] == "gemma3_270m"
    assert cells[1] == cells[5] == "v5e:2x4"
    assert all(re.fullmatch(r"\d+\.\d\d GiB", cells[place]) for place in (2, 6))
    assert all(re.fullmatch(r"\d+ ms \((compute|memory|network)\)", cells[place]) for place in (3, 7))
    assert all(re.fullmatch(r"\d+ ms", cells[place]) for place in (4, 8))
    again = readme.read_text()
    presets_table.write_table(params, readme)
    assert readme.read_text() == again
    # A model too large for every topology is said to be so.
    monkeypatch.setattr(presets_table, "argument_bytes", lambda request: 2**50)
    assert "| gemma3_270m | none of these |" in presets_table.table(params)


def test_the_latest_presets_are_on_the_fewest_chips_of_each_kind_that_hold_them(devices, monkeypatch):
    """An estimate that was extrapolated has a star."""

    def estimate(request, *_):
        chips, bits = math.prod(request.step.mesh.shape), {"bfloat16": 16, "int8": 8}[request.step.dtype]
        time = {} if request.topology.startswith("h100") else {"estimated_step_seconds": 0.25}
        found = {"fits": chips * 8 >= bits, "needed_bytes": 2**30 * bits // chips, "compiled": bits == 8, **time}
        assert request.step.settings.rematerialize
        return Estimate(mesh=list(request.step.mesh.shape), layout="auto", **found)

    monkeypatch.setattr(presets_table, "describe", lambda name: SimpleNamespace(memory_bytes=None))
    monkeypatch.setattr(presets_table, "argument_bytes", lambda request: 0)
    monkeypatch.setattr(presets_table, "estimate_step", estimate)
    lines = presets_table.table_of_chips(plan_settings(), ["gemma4_26b_a4b"]).splitlines()
    assert lines[0] == "| preset | base | v5e | v6e | v5p | h100 |"
    assert lines[2] == "| gemma4_26b_a4b | bfloat16 |" + " 4: 4.00 GiB, 250 ms* |" * 3 + " 2: 8.00 GiB* |"
    assert lines[3] == "| gemma4_26b_a4b | int8 |" + " 1: 8.00 GiB, 250 ms |" * 3 + " 1: 8.00 GiB |"
    assert set(presets_table.LATEST) <= set(catalog.GEMMAS)


def test_the_table_of_presets_plans_runs_that_params_yaml_may_ask_for(devices, monkeypatch):
    """In full, that is a dtype in which AdamW's steps change something."""
    planned = []

    def estimate(request, *_):
        planned.append((request.step.settings.rank, request.step.dtype))
        return Estimate(mesh=[1, 8], layout="auto", fits=True)

    monkeypatch.setattr(presets_table, "describe", lambda name: SimpleNamespace(memory_bytes=1))
    monkeypatch.setattr(presets_table, "argument_bytes", lambda request: 0)
    monkeypatch.setattr(presets_table, "estimate_step", estimate)
    for rank in presets_table.DTYPES:
        presets_table.smallest(plan_settings(), "gemma3_270m", rank)
    assert planned == [(4, "bfloat16"), (0, "mixed_bfloat16")]
    for rank, dtype in planned:
        found = read_params(ROOT / "params.yaml", (f"finetune.rank={rank}", f"load.dtype={dtype}"))
        assert (found.finetune.rank, found.load.dtype) == (rank, dtype)


def test_the_table_of_presets_needs_its_marks(tmp_path):
    (tmp_path / "a.md").write_text("no marks")
    for name in ("a.md", "missing.md"):
        with pytest.raises(ParamsError, match="--presets needs a file with the marks"):
            presets_table.write_table(plan_settings(), tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "device_bytes", "said"),
    [
        ({"fits": False, "needed_bytes_per_device": 20 * 2**30}, None, "does not fit on v5e:2x4: it needs 20.00 GiB"),
        ({"fits": False}, None, "does not fit on v5e:2x4:"),
        ({"fits": True, "needed_bytes_per_device": 9 * 2**30}, 8 * 2**30, "needs 9.00 GiB per device"),
        ({"fits": True, "needed_bytes_per_device": 9 * 2**30}, 16 * 2**30, None),
        ({"fits": False, "batch_size": 64}, None, None),
        ({"fits": False, "preset": "gemma_2b_en"}, None, None),
    ],
)
def test_a_run_that_the_plan_said_does_not_fit_is_warned_of(tmp_path, logged, changes, device_bytes, said):
    asked = {"preset": "gemma3_270m", "mesh": [1, 8], "layout": "auto", "dtype": "float32", "step": "ours"}
    asked |= {"batch_size": 2, "length": 128, "rank": 4, "rematerialize": False}
    plan = PlanFile(
        targets={"a target": Target(**{**asked, "topology": "v5e:2x4", "devices": 8, **changes})},
        search=None,
        scaling=None,
    )
    run = RunKey(**asked)
    warn_if_planned_not_to_fit(tmp_path, run, device_bytes)
    assert logged() == [], "there is no plan yet"
    write_json(tmp_path / PLAN, plan.content())
    warn_if_planned_not_to_fit(tmp_path, run, device_bytes)
    if said is None:
        assert logged() == []
    else:
        (line,) = logged()
        assert said in line and "a target" in line


def test_what_the_warning_compares_is_what_the_plan_writes(presets):
    asked = request(presets["gemma"], "cpu:8")
    tuned = asked.step.settings
    target = targets.target_of("tiny", asked, compilation.compile_step(asked))
    config = tiny_models.describe(open_tiny(presets["gemma"]), (2, 4)).model_copy(update={"preset": "tiny"})
    run = run_check.run_of(config, tuned, asked.step.length)
    assert run.matches(target)
    # The rules of a named layout are told by its name.
    assert [key for key, value in run.model_dump().items() if value is None] == ["rules"]
