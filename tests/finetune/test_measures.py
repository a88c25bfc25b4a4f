"""What a run says of itself: flops, where the time went, memory, and a profile."""

from __future__ import annotations

import gzip
import json
import math

import jax
import numpy as np
import pytest

from stages.core.common.host_memory import Growth, peak_host_bytes
from stages.core.finetune import trainer
from stages.core.finetune.checkpoint import Store
from stages.core.finetune.flops import step_flops
from stages.core.finetune.history import History
from stages.core.finetune.result import Result
from stages.core.load import lora_kernels
from stages.core.load.backbone import build_backbone
from stages.core.presets.formats import format_of
from stages.core.records.finetune import Step
from stages.core.records.layout import LoraConfig
from tests.support.declared import architecture
from tests.support.tiny_models import load_tiny, sequences
from tests.support.tiny_runs import data, settings, train


@pytest.fixture(scope="module")
def measured(one_block, tmp_path_factory):
    """A run of six steps with everything on, its metrics and the folder of its profile."""
    folder = tmp_path_factory.mktemp("profile")
    wanted = settings(
        batch_size=2, steps=6, epochs=2, validate_every=2, sample_every=3, sample_tokens=2, checkpoint_every=2
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_TUNING_CACHE", str(tmp_path_factory.mktemp("cache")))
        result, _ = train(
            one_block,
            wanted,
            store=Store("measured", 2),
            tokenizer=format_of("keras").load_tokenizer(one_block),
            profile=folder,
            load_seconds=1.5,
        )
    return result, folder


def test_the_times_of_a_run_are_told_apart(measured):
    metrics = measured[0].metrics()
    assert metrics.load_seconds == 1.5
    for kind in ("compile", "train", "validation", "sample", "checkpoint"):
        assert getattr(metrics, f"{kind}_seconds") > 0.0, kind
    assert metrics.compile_seconds < metrics.train_seconds
    assert metrics.step_seconds_median < metrics.compile_seconds
    assert metrics.steps == 6
    assert "peak_device_bytes" not in metrics.content(), "the CPU backend does not tell"


def test_the_share_of_the_peak_follows_from_flops_time_and_the_measured_product(measured):
    metrics = measured[0].metrics()
    reached = metrics.flops_per_step / metrics.step_seconds_median
    share = reached / metrics.flops_per_second_of_matrix_product
    assert metrics.flops_share_of_peak == pytest.approx(share, abs=1e-4, rel=0.02)
    assert 1e9 < metrics.flops_per_second_of_matrix_product < 1e14


def test_memory_is_told_as_what_is_held_and_how_far_a_step_grows():
    grown = Growth()
    block = np.ones(2**26, "f4")
    if grown.bytes() is None:
        pytest.skip("only Linux tells how far a process grew")
    # What earlier tests left behind may be freed meanwhile.
    assert 0.5 * block.nbytes < grown.bytes() < 1.5 * block.nbytes
    before = peak_host_bytes()
    del block
    assert Growth().bytes() < 2**26, "what was freed does not count again"
    assert peak_host_bytes() >= before, "the mark that was taken back is remembered"


def test_a_profile_opens_in_tensorboard_and_perfetto(measured):
    folder = measured[1]
    assert list(folder.glob("plugins/profile/*/*.xplane.pb"))
    (trace,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    names = {event.get("name", "") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert any("train_step" in name for name in names)


def test_the_flops_of_gemma_3_270m_are_those_of_a_count_by_hand(devices):
    blocks = 18 * (640 * 256 * (4 + 1 + 1 + 4) + 3 * 640 * 2048)
    head = 262_144 * 640
    attention = 12 * 128 * (4 * 256) * 18
    adapters = 18 * (4 * 640 * 4 + 4 * (4 * 256) + 640 * 4 + 4 * 256)
    backbone = build_backbone(architecture("gemma3_270m"), "float32")
    lora_kernels.declare(backbone, LoraConfig(4, None, ("query", "value")))
    assert step_flops(backbone, 1, 128) == 128 * (4 * (blocks + head) + 6 * adapters + attention)
    whole = build_backbone(architecture("gemma3_270m"), "float32")
    lora_kernels.declare(whole, LoraConfig(0))
    assert step_flops(whole, 2, 128) == 256 * (6 * (blocks + head) + attention)


def test_the_flops_of_gemma_4_e2b_count_no_look_up_and_the_kernels_that_each_block_has(devices):
    def attention(head: int, *, keys: bool) -> int:
        return 1536 * head * (2 * 8 + (2 if keys else 0))

    # Every fifth of 35 blocks sees everything; the last 20 have no keys and values.
    blocks = 12 * attention(256, keys=True) + 3 * attention(512, keys=True)
    blocks += 16 * attention(256, keys=False) + 4 * attention(512, keys=False)
    blocks += 3 * 1536 * (15 * 6144 + 20 * 12288) + 35 * 2 * 1536 * 256
    once = 1536 * 35 * 256
    adapters = 35 * 8 * 1536 * 4 + 8 * 4 * (28 * 256 + 7 * 512)
    squares = 12 * 128 * 8 * (28 * 256 + 7 * 512)
    backbone = build_backbone(architecture("gemma4_2b"), "float32")
    lora_kernels.declare(backbone, LoraConfig(4, None, ("query",)))
    expected = 4 * (blocks + 262_144 * 1536) + 2 * once + 6 * adapters + squares
    assert step_flops(backbone, 1, 128) == 128 * expected


@pytest.mark.parametrize("rank", [0, 2])
def test_the_formula_agrees_with_the_products_in_the_program(presets, rank):
    """Counted in the step's own program; the first block needs no gradient in its frozen inputs, hence the margin."""
    model = load_tiny(presets["gemma3"], (1, 1), rank=rank)
    causal = trainer.make_causal(model, settings(rank=rank))
    causal.compile(optimizer=None, loss=None)
    batch = sequences(2, 32)
    rest = [each.value for each in causal.non_trainable_variables]
    metrics = [each.value for each in causal.metrics_variables]

    def loss(trainable):
        return causal.compute_loss_and_updates(trainable, rest, metrics, batch, None, None, training=True)[0]

    def products(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                shape = equation.invars[0].aval.shape
                total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
            total += sum(products(inner) for inner in jax.core.jaxprs_in_params(equation.params))
        return total

    program = jax.make_jaxpr(jax.grad(loss))([each.value for each in causal.trainable_variables])
    assert products(program.jaxpr) == pytest.approx(step_flops(model.backbone, 2, 32), rel=0.12)


def test_a_run_in_two_processes_counts_two_compilations():
    rest = dict.fromkeys(Step.model_fields, 1)
    rows = [Step(**rest | {"loss": float(tokens), "tokens": tokens}) for tokens in (1, 3, 3, 1, 5, 1)]
    history = History(rows=rows, step_seconds=[9.0, 1.0, 1.0, 5.0, 1.0, 1.0], first_steps=[0, 3], step_growth=5)
    result = Result(
        history,
        total_parameters=1,
        trainable_parameters=1,
        peak_host_bytes=1,
        peak_device_bytes=7,
        state_bytes=3,
        flops_per_step=100,
        positions_per_step=64,
        matrix_product_rate=50.0,
        devices=4,
        device_kind="TPU v5 lite",
        optimizer=None,
    )
    metrics = result.metrics()
    assert metrics.compile_seconds == 12.0
    assert metrics.step_seconds_median == 1.0
    assert metrics.peak_device_bytes == 7
    assert (metrics.state_bytes_per_device, metrics.step_growth_bytes) == (3, 5)
    assert metrics.flops_share_of_peak == 0.5
    # A step counts by its tokens, and a step that holds a compilation has no speed.
    assert metrics.tokens == 14
    assert metrics.loss_first == metrics.loss_last == round((1 + 9 + 9 + 1 + 25 + 1) / 14, 4)
    assert metrics.tokens_per_second == (3 + 3 + 5 + 1) / 4
    assert metrics.positions_per_second == 64.0


def test_prompts_and_padding_are_positions_and_no_trained_tokens(one_block):
    given = data(6)
    given["train"]["weights"][:, 4:] = 0.0
    result, _ = train(one_block, settings(batch_size=3, gradient_accumulation=2), given, shape=(2, 1))
    (row,) = result.history.rows
    assert row.tokens == 6 * 4
    # Batches of 3 are padded to 4.
    assert row.positions_per_second / row.tokens_per_second == pytest.approx(2 * 4 * 32 / 24)


def test_sequences_without_review_numbers_are_trained_on_too(one_block):
    given = data()
    del given["train"]["review"]
    assert train(one_block, settings(batch_size=2, steps=1), given)[0].history.steps == 1
