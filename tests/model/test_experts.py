"""Gemma 4 with experts: their products, their gradients, on one device and on meshes.

test_gemma4.py compares a model in the shape of 26B-A4B with the readers.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stages.core.common.errors import StageError
from stages.core.config.schema import Layout
from stages.core.finetune.flops import step_flops
from stages.core.model import experts, sorted_products
from stages.core.model.causal_lm import BUSIEST, make_model
from stages.core.model.experts import Choice, Matrix, Router
from tests.support.passes import loss_and_gradients
from tests.support.tiny_models import AUTO, float_values, load_tiny, sequences
from tests.support.tiny_presets import EXPERTS, write_tiny_preset
from tests.support.tiny_runs import sampled, settings, train

EVERYWHERE = ("attention/.*", "ffw_.*")
GATHERED = Layout(name="auto", rules=None, shard_over_batch="weights", max_replicated_fraction=1.0)
CLOSE = 1e-5
"""Of a gradient's largest number: sums are divided over devices. Measured 2.5e-6."""


@pytest.fixture(scope="module")
def small(devices, tmp_path_factory) -> Path:
    """Two blocks, with four experts of 24 units."""
    return write_tiny_preset(tmp_path_factory.mktemp("small"), "gemma4", **EXPERTS)


@pytest.fixture(scope="module")
def alone(small):
    """Loss and gradients of all weights on one device."""
    return loss_and_gradients(load_tiny(small, (1, 1), rank=0), sequences(4))


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], close: float = CLOSE) -> None:
    assert found.keys() == wanted.keys()
    for path, gradient in wanted.items():
        assert np.abs(found[path] - gradient).max() <= close * np.abs(gradient).max(), path


@pytest.mark.parametrize(
    ("shape", "layout", "split"),
    [
        ((1, 4), AUTO, ("model", None, None)),
        ((1, 8), AUTO, (None, None, "model")),
        ((4, 1), AUTO, (None, None, None)),
        ((2, 4), GATHERED, ("model", "batch", None)),
        ((4, 1), GATHERED, (None, "batch", None)),
    ],
    ids=["experts", "units", "batch", "experts, gathered", "batch, gathered"],
)
def test_a_mesh_computes_what_one_device_does(small, alone, shape, layout, split):
    model = load_tiny(small, shape, rank=0, layout=layout)
    placed = {each.weight.path: each.spec for each in model.placements}
    assert placed["decoder_block_1/moe_expert_bank/gate_proj"] == split
    loss, gradients = loss_and_gradients(model, sequences(4))
    assert loss == pytest.approx(alone[0], rel=1e-6)
    assert_close(gradients, alone[1])


def test_hidden_dimensions_that_a_rule_splits_are_gathered(small, alone):
    rules = [{"pattern": ".*/moe_expert_bank/(gate|up)_proj", "spec": [None, "model", None]}]
    layout = Layout(name="rules", rules=rules, shard_over_batch="none", max_replicated_fraction=1.0)
    loss, gradients = loss_and_gradients(load_tiny(small, (2, 2), rank=0, layout=layout), sequences(4))
    assert loss == pytest.approx(alone[0], rel=1e-6)
    assert_close(gradients, alone[1])


def test_rematerialized_the_gradients_are_the_same(small, alone):
    model = load_tiny(small, (2, 4), rank=0, layout=GATHERED)
    _, gradients = loss_and_gradients(model, sequences(4), rematerialize=True)
    assert_close(gradients, alone[1])


def test_text_on_meshes_is_that_of_one_device(small):
    prompts = [[2, 10, 11, 12], [2, 40], [2, *range(100, 113)]]
    one, *others = (sampled(load_tiny(small, shape), prompts) for shape in ((1, 1), (1, 4), (1, 8)))
    assert others == [one, one]


# --- The products of sorted rows. ---


def of_numbers(shape: tuple[int, ...], seed: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def dense(y, choice, gate, up, down):
    """Every expert for every token, weighed with zero where it was not chosen."""
    weights = jnp.zeros((len(y), len(gate))).at[jnp.arange(len(y))[:, None], choice.experts].add(choice.weights)
    hidden = jax.nn.gelu(jnp.einsum("td,edf->etf", y, gate), approximate=True) * jnp.einsum("td,edf->etf", y, up)
    return jnp.einsum("etf,efd,te->td", hidden, down, weights)


@pytest.fixture(scope="module")
def bank() -> tuple[jax.Array, Choice, list[jax.Array]]:
    """Twenty tokens' hidden states, their choices of two of five experts (none of the fourth), and three matrices."""
    chosen = np.random.default_rng(0).permuted(np.tile([0, 1, 2, 4], (20, 1)), axis=1)[:, :2]
    choice = Choice(jnp.asarray(chosen, jnp.int32), jax.nn.softmax(of_numbers((20, 2), 1)))
    matrices = [of_numbers(shape, seed) / 4 for seed, shape in enumerate([(5, 16, 8), (5, 16, 8), (5, 8, 16)], 2)]
    return of_numbers((20, 16), 5), choice, matrices


def ragged(y, choice, *matrices, **part):
    return experts.mix(y, choice, [Matrix(each, None, None) for each in matrices], (True,) * 3, **part)


def test_ragged_products_are_those_of_the_dense_form_in_value_and_gradient(bank):
    y, choice, matrices = bank

    def of(form, y, weights, *matrices):
        return jnp.sum(jnp.sin(form(y, choice._replace(weights=weights), *matrices)))

    found, wanted = (
        jax.value_and_grad(functools.partial(of, form), argnums=range(5))(y, choice.weights, *matrices)
        for form in (ragged, dense)
    )
    assert not np.any(found[1][2][3]), "nothing was sent to it"
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_parts_of_the_experts_add_up_whatever_a_product_has_in_the_rows_of_others(bank, monkeypatch):
    """On TPUs and GPUs what a product has in rows of no expert here, and so their gradient, is whatever was there."""
    y, choice, matrices = bank

    def undefined(product, x, w, sizes):
        rows = product(x, w, sizes)
        return jnp.where((jnp.arange(len(rows)) < jnp.sum(sizes))[:, None], rows, jnp.nan)

    for name in ("_masked", "_masked_back"):
        product = getattr(sorted_products, name)
        monkeypatch.setattr(sorted_products, name, functools.partial(undefined, product))
    monkeypatch.setattr(sorted_products, "_of_matrices", sorted_products._of_matrices_by_tiles)

    def summed(y, weights, *matrices):
        weighed = choice._replace(weights=weights)
        parts = [
            ragged(y, weighed, *(each[start:end] for each in matrices), first=jnp.int32(start))
            for start, end in ((0, 3), (3, 5))
        ]
        return jnp.sum(jnp.sin(sum(parts)))

    def whole(y, weights, *matrices):
        return jnp.sum(jnp.sin(dense(y, choice._replace(weights=weights), *matrices)))

    found, wanted = (
        jax.value_and_grad(each, argnums=range(5))(y, choice.weights, *matrices) for each in (summed, whole)
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_the_gradient_of_a_float32_matrix_is_not_rounded(bank):
    y, choice, matrices = bank
    y, exact = y.astype(jnp.bfloat16), [each.astype(jnp.bfloat16).astype("f4") for each in matrices]

    def of(*matrices):
        return jnp.sum(ragged(y, choice, *matrices).astype("f4") ** 2)

    for gradient in jax.grad(of, argnums=range(3))(*exact):
        assert gradient.dtype == jnp.float32
        assert np.any(gradient != gradient.astype(jnp.bfloat16)), "a sum over tokens, in float32"


def test_a_router_chooses_and_weighs_in_float32():
    """Probabilities that bfloat16 cannot tell apart."""
    kernel = jnp.zeros((4, 3)).at[0].set(jnp.array([1.0, 1.001, 1.002]))
    router = Router(jnp.ones(4), kernel, jnp.array([1.0, 1.0, 2.0]))
    found = experts.route(jnp.array([[8.0, 0, 0, 0]], jnp.bfloat16), router, 2)
    assert found.experts.tolist() == [[2, 1]]
    # Of an x of one number the normed one is 2 there, times 4**-0.5.
    p = np.exp([1.002, 1.001])
    np.testing.assert_allclose(found.weights, [p / p.sum() * [2, 1]], rtol=1e-6)


# --- What goes with it. ---


@pytest.mark.parametrize("dtype", ["int8_float32", "int4_float32"])
def test_a_base_of_codes_with_experts_is_the_float_model_of_its_codes(small, dtype):
    for shape in ((1, 1), (1, 4), (1, 8)):
        codes = load_tiny(small, shape, rank=2, targets=EVERYWHERE, dtype=dtype)
        floats = load_tiny(small, (1, 1), rank=2, targets=EVERYWHERE)
        values = float_values(codes)
        for variable in floats.backbone.weights:
            variable.assign(values[variable.path])
        kinds = {each.path.split("/")[-1]: str(each.dtype) for each in codes.backbone.weights if "_proj" in each.path}
        of_pairs = dtype.partition("_")[0]
        wanted = {"gate_proj": of_pairs, "up_proj": of_pairs, "down_proj": "int8"}
        assert {name: kinds[name] for name in wanted} == wanted
        (one, found), (other, wanted) = (loss_and_gradients(each, sequences(2)) for each in (codes, floats))
        assert one == pytest.approx(other, rel=1e-5)
        assert_close(found, wanted, 1e-4)


def test_an_adapter_on_experts_is_refused_in_a_line_and_left_out_of_a_pattern(small):
    with pytest.raises(StageError, match=r"LoRA on a router or its experts is not supported.*Choose of: query") as told:
        load_tiny(small, (1, 1), rank=2, targets=("moe_.*",))
    assert len(str(told.value).splitlines()) == 1
    model = load_tiny(small, (1, 1), rank=2, targets=(".*",))
    assert not any("moe" in variable.path for variable in model.backbone.trainable_variables)


def test_flops_count_the_experts_that_a_token_is_sent_to(small):
    backbone = load_tiny(small, (1, 1), rank=0).backbone
    others = sum(each.value.size for each in backbone.weights if each.path.endswith(("/kernel", "/embeddings")))
    of_experts = 2 * 2 * 3 * 64 * 24  # blocks, experts a token, matrices, hidden, units
    attention = 2 * 32 * (4 * 16 + 4 * 32)
    assert step_flops(backbone, 3, 32) == 3 * 32 * 6 * (others + of_experts + attention)


def test_the_share_of_the_busiest_expert_counts_no_padding(small):
    model = load_tiny(small, (2, 2))
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    share = jax.jit(lambda rows: causal.call(rows, training=True)[BUSIEST])
    rows = sequences(2)
    alone = {name: each[:, :8] for name, each in rows.items()}
    rows["segment_ids"][:, 8:] = 0
    assert 0.5 <= share(rows) == share(alone) <= 1.0
    assert share(sequences(2)) != share(alone)
    assert BUSIEST not in causal.call(rows)


def test_a_run_tells_the_share_of_the_busiest_expert(small):
    result, _ = train(
        small, settings(steps=3, epochs=2, gradient_accumulation=2, targets=list(EVERYWHERE)), shape=(2, 2)
    )
    shares = result.history.busiest_expert
    assert len(shares) == 3 and all(0.5 <= each <= 1 for each in shares)
    assert result.metrics().busiest_expert_share == pytest.approx(np.mean(shares), abs=1e-4)
