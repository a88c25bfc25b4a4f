"""Shapes first: every public Gemma is laid out, counted and checked without a byte of weights."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import pytest

from stages.core.common.errors import ParamsError, StageError
from stages.core.fetch.catalog import GEMMAS, architecture
from stages.core.fetch.local import fetch_local
from stages.core.plan import search
from stages.core.plan.compilation import CompileRequest
from stages.core.plan.search import small_programs
from stages.core.plan.shapes import count_parameters, count_trainable, resolve_shapes
from stages.core.presets.architecture import Architecture
from stages.core.presets.layer_kinds import of_blocks
from stages.core.records.layout import LoraConfig, MeshShape
from stages.core.sharding.layout import Rule, Weight, resolve
from stages.core.sharding.named_layouts import auto, make_layout, tutorial
from tests.support import warm
from tests.support.fake_preset import manifest_of
from tests.support.repository import REAL_CACHE, ROOT
from tests.support.tiny_models import AUTO, load_tiny, open_tiny

LORA = LoraConfig(4, None, ("query", "value"))
OF_TRANSFORMERS = {
    "gemma4_2b": 4_628_569_344,
    "gemma4_4b": 7_463_013_376,
    "gemma4_26b_a4b": 25_233_141_760,
    "gemma4_31b": 30_697_345_280,
}
"""Parameters of Gemma 4's text models by transformers' own count."""


@pytest.mark.parametrize("preset", GEMMAS)
def test_the_parameter_count_of_every_preset_is_the_registrys(devices, preset):
    import keras_hub

    mesh = MeshShape((1, 8))
    placements = resolve_shapes(architecture(preset), mesh, auto(architecture(preset), mesh), "bfloat16")
    assert count_parameters(placements) == GEMMAS[preset]["params"]
    registry = keras_hub.models.GemmaBackbone.presets | keras_hub.models.Gemma3Backbone.presets
    if preset in OF_TRANSFORMERS:
        # The registry rounds, and counts the towers; keras-hub has one number more a block.
        assert GEMMAS[preset]["params"] == OF_TRANSFORMERS[preset] + GEMMAS[preset]["num_layers"]
    else:
        assert registry[preset]["metadata"]["params"] == GEMMAS[preset]["params"]


@pytest.mark.parametrize("preset", GEMMAS)
def test_small_programs_have_blocks_of_all_shapes(preset):
    whole = architecture(preset)
    programs = small_programs(whole, 512)
    assert (programs is None) == (preset in ("gemma4_2b", "gemma4_4b")), "blocks that share keys and values"
    if programs is None:
        return
    assert sum(programs) < whole.config["num_layers"], "less to compile than the model"
    for blocks in programs:
        kinds = Architecture(whole.class_name, of_blocks(whole, blocks)).kinds
        assert {each.shapes for each in kinds} == {each.shapes for each in whole.kinds}


@pytest.mark.parametrize("preset", GEMMAS)
def test_small_programs_add_up_to_the_blocks_of_the_model(monkeypatch, preset):
    def compile_step(asked):
        return SimpleNamespace(fits=True, blocks=asked.blocks or count, temporary_bytes=asked.blocks)

    whole = architecture(preset)
    count = whole.config["num_layers"]
    monkeypatch.setattr(search, "compile_step", compile_step)
    costs, often = search._compiled(CompileRequest(SimpleNamespace(architecture=whole, length=512), "cpu:8"))
    assert costs[0].blocks + often * (costs[-1].blocks - costs[0].blocks) == pytest.approx(count)


def test_gemma_7b_at_rank_4_has_the_tutorials_counts(devices):
    mesh = MeshShape((1, 8))
    placements = resolve_shapes(architecture("gemma_7b_en"), mesh, tutorial(), "float32", LORA)
    assert count_parameters(placements) == 8_548_748_288
    assert count_trainable(placements) == 11_067_392


def test_in_full_parameter_mode_every_weight_has_both_slots_where_it_lies(devices):
    gemma, mesh = architecture("gemma2_2b_en"), MeshShape((2, 4))
    placements = resolve_shapes(gemma, mesh, auto(gemma, mesh), "float32", LoraConfig(0))
    assert count_trainable(placements) == count_parameters(placements) == GEMMAS["gemma2_2b_en"]["params"]
    by_path = {each.weight.path: each for each in placements}
    for each in placements:
        if each.weight.kind == "optimizer":
            owner = by_path[each.weight.path.rpartition("/")[0]]
            assert (each.shard_shape, each.weight.dtype) == (owner.shard_shape, owner.weight.dtype)


@pytest.mark.parametrize("rank", [2, 0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
def test_the_slots_foreseen_are_those_that_adamw_makes(presets, rank, dtype):
    lora = dataclasses.replace(LORA, rank=rank)
    model = load_tiny(presets["gemma2"], (2, 4), rank=rank, dtype=dtype)
    optimizer = keras.optimizers.AdamW()
    optimizer.build(model.backbone.trainable_variables)
    made = [
        (tuple(each.shape), str(each.dtype), each.value.sharding.shard_shape(tuple(each.shape)))
        for each in optimizer.variables
        if len(each.shape)
    ]
    gemma = open_tiny(presets["gemma2"]).architecture
    layout = make_layout(AUTO, gemma, model.mesh_shape)
    foreseen = [
        (each.weight.shape, each.weight.dtype, each.shard_shape)
        for each in resolve_shapes(gemma, model.mesh_shape, layout, dtype, lora)
        if each.weight.kind == "optimizer"
    ]
    assert sorted(made) == sorted(foreseen)


def test_a_preset_that_does_not_exist_gets_the_nearest_names():
    with pytest.raises(ParamsError, match=r"Received: --preset=gemma3_27b_txt\nDid you mean gemma3_27b_text"):
        architecture("gemma3_27b_txt")


def test_a_rule_for_lora_kernels_waits_until_there_are_some():
    mesh = MeshShape((1, 2))
    query = Weight("decoder_block_0/attention/query/kernel", (4, 8, 8), "float32")
    kernel = Weight("decoder_block_0/attention/query/lora_kernel_a", (4, 8, 2), "float32", "lora")
    rules = [Rule(".*/lora_kernel_a", ("model", None, None))]
    assert resolve(rules, [query], mesh)[0].rule is None
    assert resolve(rules, [query, kernel], mesh)[1].shard_shape == (2, 8, 2)
    with pytest.raises(StageError, match="matches nothing"):
        resolve([Rule(".*/lora_kernel_c", ("model", None, None))], [query, kernel], mesh)


def test_a_27b_on_32_devices_resolves_in_the_memory_of_its_names(record_property):
    """A process of its own, so that nothing but the declaring is measured."""
    code = """
import json, resource, time
from stages.core.sharding import devices
devices.configure("simulated", 1)
from stages.core.load import backbone
backbone.import_keras_hub()
from stages.core.fetch import catalog
from stages.core.sharding import named_layouts
from stages.core.plan import shapes
from stages.core.records.layout import LoraConfig, MeshShape
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, began = peak(), time.perf_counter()
gemma, mesh = catalog.architecture("gemma3_27b_text"), MeshShape((4, 8))
lora = LoraConfig(4, None, ("query", "value"))
placements = shapes.resolve_shapes(gemma, mesh, named_layouts.auto(gemma, mesh), "bfloat16", lora)
import jax
print(json.dumps([peak() - before, time.perf_counter() - began, len(placements), len(jax.devices())]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    memory, seconds, count, devices = json.loads(done.stdout.splitlines()[-1])
    print(f"Gemma 3 27B on 32 devices: {seconds:.2f} s, {memory / 1e6:.0f} MB above the imports")
    record_property("seconds", seconds)
    assert memory < 1e9
    assert count > 62 * 13
    assert devices == 1


def dry_run(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the load stage with --dry-run as a user does."""
    command = [warm.python(), "-m", "stages.load", "--dry-run", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder with the settings and the code and no outputs."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    return tmp_path


def test_a_dry_run_of_a_public_preset_needs_nothing_and_leaves_nothing(clone):
    lora = ("--set", "finetune.rank=4", "--set", "finetune.targets=[query, value]")
    shown = dry_run("--preset", "gemma_7b_en", "--set", "mesh.shape=[4,8]", *lora, cwd=clone)
    assert shown.returncode == 0, shown.stderr
    assert "decoder_block_1/attention/query/lora_kernel_a" in shown.stdout
    assert "PartitionSpec('model', None, None)" in shown.stdout
    assert "Mesh: (batch=4, model=8), 32 devices." in shown.stdout
    assert "Parameters: 8,548,748,288. Trainable (LoRA rank 4 on query, value): 11,067,392." in shown.stdout
    assert "Replicated fraction of the weights' bytes: 0.0000" in shown.stdout
    assert sorted(path.name for path in clone.iterdir()) == ["params.yaml", "stages"]


def test_a_dry_run_tells_the_fallbacks_with_their_reasons(clone):
    shown = dry_run("--preset", "gemma_2b_en", "--set", "mesh.shape=[1,8]", cwd=clone)
    assert "attention/(key|value)/kernel split over head_dim, since 8 devices do not divide 1 key/value" in shown.stdout


def test_a_dry_run_stops_where_the_load_would(clone):
    stopped = dry_run("--preset", "gemma3_1b", "--set", "layout.name=tutorial", "--set", "mesh.shape=[1, 8]", cwd=clone)
    assert stopped.returncode == 1
    assert "of size 4 must be divisible by the 8 devices" in stopped.stderr
    rules = '--set=layout.rules=[{"pattern": ".*/ffw_linear/kernel", "spec": [model, null]}]'
    stopped = dry_run("--preset", "gemma_2b_en", "--set", "layout.name=rules", rules, cwd=clone)
    assert stopped.returncode == 1
    assert "Largest: token_embedding/embeddings" in stopped.stderr


def test_a_dry_run_of_an_unknown_preset_ends_with_exit_code_2_and_the_nearest_name(clone):
    stopped = dry_run("--preset", "gemma_7b", cwd=clone)
    assert stopped.returncode == 2
    assert "Received: --preset=gemma_7b\nDid you mean gemma_7b_en" in stopped.stderr
    assert "Traceback" not in stopped.stderr


def test_a_preset_by_name_is_for_dry_runs_only():
    command = [warm.python(), "-m", "stages.load", "--preset", "gemma_7b_en"]
    stopped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert stopped.returncode == 2
    assert "--preset goes with --dry-run" in stopped.stderr


@pytest.mark.parametrize("family", ["gemma", "gemma3"])
def test_a_dry_run_of_the_fetched_preset_reads_no_weights(clone, presets, family, tmp_path_factory):
    folder = Path(shutil.copytree(presets[family], tmp_path_factory.mktemp("dry") / "preset"))
    (clone / "models/preset").mkdir(parents=True)
    fetch_local("mine", str(folder), clone).write(clone / "models/preset/manifest.json")
    (folder / "model.weights.h5").unlink()
    settings = ["--set", "layout.max_replicated_fraction=1.0", "--set", "mesh.shape=[2,16]"]
    shown = dry_run(*settings, cwd=clone)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("mine, float32\n")
    assert "32 devices" in shown.stdout
    (folder / "config.json").write_text("{}")
    stopped = dry_run(*settings, cwd=clone)
    assert stopped.returncode == 1
    assert "config.json is not the file that the manifest names" in stopped.stderr


def test_a_dry_run_of_the_embedded_preset_counts_what_the_registry_does(clone, real_gguf):
    manifest = manifest_of(real_gguf.parent, [file.name for file in real_gguf.parent.iterdir()])
    (clone / "models/preset").mkdir(parents=True)
    changes = {"source": "pypi", "format": "gguf", "folder": f"presets/{real_gguf.parent.name}"}
    manifest.model_copy(update=changes).write(clone / "models/preset/manifest.json")
    shown = dry_run("--set", "finetune.rank=0", cwd=clone, GEMMA_TUNING_CACHE=str(REAL_CACHE))
    assert shown.returncode == 0, shown.stderr
    assert "Parameters: 268,098,176. Trainable (every weight): 268,098,176." in shown.stdout
