"""The training step against plain Keras: keras-hub's causal model, Keras' loss, Keras' LoRA, automatic gradients."""

from __future__ import annotations

import functools
import json
import re
import subprocess

import jax
import keras
import numpy as np
import pytest

from stages.core.config.schema import Layout
from stages.core.model.causal_lm import make_model, pin_to_mesh
from stages.core.tokenize.batches import Batches
from tests.support import warm
from tests.support.passes import loss_and_gradients
from tests.support.repository import FAMILIES, ROOT
from tests.support.tiny_models import AUTO, keras_inputs, load_tiny, sequences
from tests.support.tiny_presets import write_tiny_preset
from tests.support.tiny_runs import sampled

TARGETS = ("query", "value", "ffw_gating", "attention_output")


def whole_sequences():
    """Four sequences of one segment each, as keras-hub reads them."""
    batch = sequences(4)
    batch["segment_ids"] = np.ones_like(batch["segment_ids"])
    return batch


@pytest.fixture(scope="module")
def keras_says(presets):
    """Loss and gradients by keras-hub's layers and Keras' own loss, by family and mode; computed once."""
    return functools.cache(lambda family, full: keras_loss_and_gradients(presets[family], full))


def keras_loss_and_gradients(folder, full):
    """The same by keras-hub's layers and Keras' own loss, on one device."""
    import keras_hub

    batch, model = whole_sequences(), load_tiny(folder, (1, 1), rank=0 if full else 2, targets=TARGETS)
    keras.distribution.set_distribution(None)
    backbone = keras_hub.models.Backbone.from_preset(str(folder), dtype="float32")
    if not full:
        backbone.enable_lora(2, target_layer_names=list(TARGETS))
        for layer in backbone._flatten_layers():
            if getattr(layer, "lora_enabled", False):
                layer.lora_alpha = 4.0
    values = {variable.path: np.asarray(variable.value) for variable in model.backbone.weights}
    for variable in backbone.weights:
        variable.assign(values[variable.path])
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")

    def loss(trainable, rest):
        mapping = [
            *zip(backbone.trainable_variables, trainable, strict=True),
            *zip(backbone.non_trainable_variables, rest, strict=True),
        ]
        with keras.StatelessScope(state_mapping=mapping):
            hidden = backbone(keras_inputs(backbone, batch["token_ids"]))
            logits = backbone.token_embedding(hidden, reverse=True)
            return crossentropy(batch["target_ids"], logits, sample_weight=batch["weights"])

    value, gradients = jax.jit(jax.value_and_grad(loss))(
        [variable.value for variable in backbone.trainable_variables],
        [variable.value for variable in backbone.non_trainable_variables],
    )
    paths = [variable.path for variable in backbone.trainable_variables]
    return float(value), {path: np.asarray(each) for path, each in zip(paths, gradients, strict=True)}


def assert_same(found, wanted):
    """Losses and gradients are the same but for rounding."""
    (loss, gradients), (wanted_loss, wanted_gradients) = found, wanted
    assert loss == pytest.approx(wanted_loss, rel=2e-6)
    assert gradients.keys() == wanted_gradients.keys()
    for path, gradient in gradients.items():
        scale = np.abs(wanted_gradients[path]).max()
        np.testing.assert_allclose(gradient, wanted_gradients[path], rtol=1e-3, atol=3e-5 * scale, err_msg=path)


# Of families, meshes and modes each pair.
@pytest.mark.parametrize(
    ("family", "shape", "full"),
    [
        (family, shape, bool((row + column) % 2))
        for row, family in enumerate(FAMILIES)
        for column, shape in enumerate([(1, 1), (1, 8), (2, 4), (4, 1)])
    ],
    ids=str,
)
def test_loss_and_gradients_are_plain_keras(presets, keras_says, family, shape, full):
    model = load_tiny(presets[family], shape, rank=0 if full else 2, targets=TARGETS)
    assert_same(loss_and_gradients(model, whole_sequences()), keras_says(family, full))


WEIGHTS = AUTO.model_copy(update={"shard_over_batch": "weights"})


@pytest.mark.parametrize(
    ("family", "full", "shape"),
    [*((family, full, (2, 4)) for family in FAMILIES for full in (False, True)), ("gemma2", True, (4, 1))],
)
def test_weights_over_the_batch_axis_give_the_same_gradients(presets, keras_says, family, full, shape):
    model = load_tiny(presets[family], shape, rank=0 if full else 2, targets=TARGETS, layout=WEIGHTS)
    assert_same(loss_and_gradients(model, whole_sequences()), keras_says(family, full))


TUTORIAL = AUTO.model_copy(update={"name": "tutorial"})
# Every kernel split over the dimension that auto would not choose, some over the batch axis, adapters replicated.
CONTRARY = Layout.model_validate(
    {
        "name": "rules",
        "rules": [
            {"pattern": "token_embedding/embeddings", "spec": [None, "model"]},
            {"pattern": r"decoder_block_\d+/attention/(query|key|value)/kernel", "spec": [None, "model", None]},
            {"pattern": r"decoder_block_\d+/attention/attention_output/kernel", "spec": [None, "batch", "model"]},
            {"pattern": r"decoder_block_\d+/ffw_gating(_2)?/kernel", "spec": ["model", "batch"]},
            {"pattern": r"decoder_block_\d+/ffw_linear/kernel", "spec": [None, "model"]},
        ],
        "shard_over_batch": "none",
        "max_replicated_fraction": 1.0,
    }
)


@pytest.mark.parametrize(
    ("family", "layout", "shape"),
    [
        ("gemma", TUTORIAL, (2, 2)),
        ("gemma2", TUTORIAL, (2, 2)),
        ("gemma2", CONTRARY, (2, 4)),
        ("gemma3", CONTRARY, (1, 8)),
    ],
    ids=["tutorial gemma", "tutorial gemma2", "contrary gemma2", "contrary gemma3"],
)
def test_layouts_that_replicate_adapters_or_split_oddly_give_the_same_gradients(
    presets, keras_says, family, layout, shape
):
    model = load_tiny(presets[family], shape, rank=2, targets=TARGETS, layout=layout)
    assert_same(loss_and_gradients(model, whole_sequences()), keras_says(family, False))


# 60 hidden, 6 heads, 120 units: what 3, 5 or 6 devices divide of it differs, and they never divide the vocabulary.
ODD = {"hidden_dim": 60, "num_query_heads": 6, "num_key_value_heads": 3, "intermediate_dim": 120}
# Each mesh; lengths, numbers of batches and ranks beside it.
ODD_CASES = [
    ("gemma", (1, 3), 9, 1, 0),
    ("gemma2", (2, 3), 17, 3, 2),
    ("gemma3", (1, 7), 13, 2, 0),
    ("gemma4", (1, 5), 25, 1, 2),
    ("gemma3", (1, 6), 10, 3, 2),
]


@pytest.fixture(scope="module")
def odd_presets(devices, tmp_path_factory):
    """A preset of each family whose dimensions few powers of two divide."""
    base = tmp_path_factory.mktemp("odd")
    return {family: write_tiny_preset(base / family, family, num_layers=1, **ODD) for family in FAMILIES}


@pytest.mark.parametrize(("family", "shape", "length", "batches", "rank"), ODD_CASES, ids=str)
def test_odd_meshes_lengths_batches_and_prompts_come_to_what_one_device_does(
    odd_presets, family, shape, length, batches, rank
):
    """Trains (gradients, with an adapter or in full), measures (the loss) and generates."""
    found = []
    for mesh in ((1, 1), shape):
        model = load_tiny(odd_presets[family], mesh, rank=rank, targets=("query", "value", "ffw_gating", ".*output"))
        text = sampled(model, [[2, *range(9, length)], [2, 5]])
        found.append((loss_and_gradients(model, sequences(2 * batches, length)), text))
    (wanted, wanted_text), (gradients, text) = found
    assert_same(gradients, wanted)
    assert text == wanted_text


# Twelve devices need a process of their own; all families share it.
TWELVE = """
import json, sys
from pathlib import Path
from stages.core.sharding.devices import configure
configure("simulated", 12)
from stages.core.finetune import trainer
from tests.support.tiny_runs import sampled, settings
from tests.support.tiny_models import keras_inputs, load_tiny, sequences

for preset, length in json.loads(sys.argv[1]):
    given = {"train": sequences(4, length), "validation": sequences(2, length, seed=1)}
    found = []
    for shape in ((1, 1), (1, 12)):
        model = load_tiny(Path(preset), shape, rank=2, targets=("query", "value", "ffw_gating", ".*output"))
        rows = trainer.fit(model, given, settings(batch_size=2)).history.rows
        losses = [row.loss for row in rows] + [rows[-1].validation_loss]
        found.append({"losses": losses, "text": sampled(model, [[2, *range(9, length)], [2, 5]])})
    print("FOUND", json.dumps(found))
"""


def test_auto_on_twelve_devices_trains_measures_and_generates_what_one_device_does(presets, odd_presets):
    """Twelve divide the hidden and feed-forward sizes of the odd presets, and their length; of the others nothing."""
    asked = [*([str(odd_presets[family]), 36] for family in FAMILIES), [str(presets["gemma3"]), 32]]
    command = [warm.python(), "-c", TWELVE, json.dumps(asked)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line.removeprefix("FOUND ")) for line in run.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(found) == len(asked)
    for (preset, _), (one, twelve) in zip(asked, found, strict=True):
        assert len(one["losses"]) == 3, preset
        assert twelve["losses"] == pytest.approx(one["losses"], rel=1e-4), preset
        assert twelve["text"] == one["text"], preset


RANK_SPLIT = Layout.model_validate(
    {
        "name": "rules",
        "rules": [
            {"pattern": r".*/(query|value)/kernel", "spec": [None, None, "model"]},
            {"pattern": r".*/(query|value)/lora_kernel_a", "spec": [None, None, "model"]},
            {"pattern": r".*/(query|value)/lora_kernel_b", "spec": [None, "model"]},
        ],
        "shard_over_batch": "none",
        "max_replicated_fraction": 1.0,
    }
)


def test_an_adapter_split_over_its_rank_gives_the_same_gradients(presets):
    found = []
    for shape, layout in (((1, 1), AUTO), ((1, 2), RANK_SPLIT)):
        model = load_tiny(presets["gemma3"], shape, rank=2, layout=layout)
        found.append(loss_and_gradients(model, sequences(2)))
    (wanted, wanted_gradients), (loss, gradients) = found
    assert loss == pytest.approx(wanted, rel=2e-6)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(gradient, wanted_gradients[path], rtol=1e-3, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_blocks_changes_no_gradient(presets, family):
    model = load_tiny(presets[family], (1, 4), rank=2)
    loss, gradients = loss_and_gradients(model, sequences(2))
    again, recomputed = loss_and_gradients(model, sequences(2), rematerialize=True)
    assert loss == pytest.approx(again, rel=1e-6)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(gradient, recomputed[path], rtol=1e-4, atol=1e-6)


def test_padding_a_batch_changes_neither_loss_nor_accuracy(presets):
    data = sequences(5)
    measured = []
    for shape, size in (((1, 1), 5), ((4, 2), 2), ((8, 1), 3)):
        model = load_tiny(presets["gemma3"], shape)
        causal = make_model(model.backbone, model.jax_mesh, model.placements)
        causal.compile(optimizer=None, loss=None)
        pin_to_mesh(causal, model.jax_mesh)
        measured.append(causal.evaluate(Batches(data, size, model.mesh_shape), return_dict=True, verbose=0))
    for other in measured[1:]:
        assert other["loss"] == pytest.approx(measured[0]["loss"], rel=1e-5)
        assert other["accuracy"] == pytest.approx(measured[0]["accuracy"])
    assert {"loss", "accuracy"} <= set(measured[0])


def test_no_weight_is_gathered_in_the_compiled_step(presets):
    """On a mesh only activations and sums travel; a gathered kernel would cost its whole size each step."""
    # A short sequence: kernels are larger than activations, which is when XLA is tempted.
    model = load_tiny(presets["gemma3"], (1, 8), rank=2)
    batch = sequences(2, 16)
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    causal.compile(optimizer=None, loss=None)

    def loss(trainable, rest):
        metrics = [each.value for each in causal.metrics_variables]
        return causal.compute_loss_and_updates(trainable, rest, metrics, batch, None, None, training=True)[0]

    trainable = [variable.value for variable in causal.trainable_variables]
    rest = [variable.value for variable in causal.non_trainable_variables]
    program = jax.jit(jax.grad(loss)).lower(trainable, rest).compile().as_text()
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", program)
    assert gathered, "the test looks for gathers and must see those of activations"
    kernels = {",".join(map(str, variable.shape)) for variable in model.backbone.weights}
    assert not kernels & set(gathered)


# --- Sums in float32, whatever the products are in. ---

# Sequences 0 and 5 are the same, with weights that cancel and are far larger than those of all others: their sum is the
# gradient of the others, if nothing is rounded to bfloat16 on the way. They are on two devices of the batch axis, and
# in two batches of an accumulated step.
CANCEL = {0: 1024.0, 5: -1024.0}
RATE = 1024.0


def frequent(weights):
    """Eight sequences in which each fourth token, as input and as target, is the same; weights by sequence."""
    data = sequences(8)
    often = np.random.default_rng(5).random((8, 32)) < 0.25
    for name in ("token_ids", "target_ids"):
        data[name] = np.where(often, 7, data[name]).astype(np.int32)
    for values in data.values():
        values[5] = values[0]
    for sequence, weight in weights.items():
        data["weights"][sequence] *= weight
    return data


def step_gradients(model, batches, datas):
    """The gradients by which the train step changes the weights, by path, for each set of data."""
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    causal.compile(optimizer=keras.optimizers.SGD(RATE), loss=None)
    causal.optimizer.build(causal.trainable_variables)
    pin_to_mesh(causal, model.jax_mesh)
    groups = (
        causal.trainable_variables,
        causal.non_trainable_variables,
        causal.optimizer.variables,
        causal.metrics_variables,
    )
    state = tuple([variable.value for variable in group] for group in groups)
    split = jax.sharding.NamedSharding(model.jax_mesh, jax.sharding.PartitionSpec("batch"))
    # XLA may leave a rounding out that a TPU's sums over devices do.
    step = jax.jit(causal.train_step, compiler_options={"xla_allow_excess_precision": False})
    found = []
    for data in datas:
        if batches > 1:
            data = {name: each.reshape(-1, batches, *each.shape[1:]) for name, each in data.items()}
        _, (after, *_) = step(state, ({name: jax.device_put(each, split) for name, each in data.items()},))
        changes = zip(causal.trainable_variables, state[0], after, strict=True)
        found.append({each.path: (np.asarray(one) - np.asarray(other)) / RATE for each, one, other in changes})
    return found


def assert_close(gradients, wanted, tolerance):
    assert gradients.keys() == wanted.keys()
    for path, gradient in gradients.items():
        error = np.linalg.norm(gradient - wanted[path]) / np.linalg.norm(wanted[path])
        assert error < tolerance, path


@pytest.fixture(scope="module")
def in_float32(presets):
    """The gradients of the sequences that are left, in float32 on one device, by family and rank; computed once."""

    @functools.cache
    def gradients(family, rank):
        model = load_tiny(presets[family], (1, 1), rank=rank, targets=("query", "value", "ffw_gating", ".*output"))
        return step_gradients(model, 1, [frequent(dict.fromkeys(CANCEL, 0.0))])[0]

    return gradients


SUMS = [
    ("mixed_bfloat16", 0, (1, 1), 1),
    ("mixed_bfloat16", 0, (2, 4), 1),
    ("mixed_bfloat16", 0, (1, 1), 4),
    ("mixed_bfloat16", 2, (2, 4), 1),
    ("mixed_bfloat16", 2, (1, 1), 4),
    ("bfloat16", 2, (2, 4), 2),
]


# What is summed where is the same code for all families; of the others one in full and one with an adapter each.
@pytest.mark.parametrize(
    ("family", "dtype", "rank", "shape", "batches"),
    [
        *(("gemma3", *each) for each in SUMS),
        *(("gemma2", *SUMS[place]) for place in (1, 4)),
        *(("gemma", *SUMS[place]) for place in (2, 3)),
    ],
    ids=str,
)
def test_gradients_are_summed_in_float32_over_tokens_devices_and_batches(
    presets, in_float32, family, dtype, rank, shape, batches
):
    targets = ("query", "value", "ffw_gating", ".*output")
    model = load_tiny(presets[family], shape, rank=rank, targets=targets, dtype=dtype)
    datas = [frequent(CANCEL), frequent(dict.fromkeys(CANCEL, 0.0))]
    gradients, of_the_others = step_gradients(model, batches, datas)
    assert_close(gradients, of_the_others, 1e-3)
    # Products in bfloat16 make a difference of their own.
    assert_close(gradients, in_float32(family, rank), 0.15)
