"""Gemma 4's text models, against transformers and keras-hub: what they compute, and their gradients.

Those of the 31B: blocks with windows, shorter than the packed texts are, and last one that has heads of another number
and size, and values that are its keys. Those of 26B-A4B have experts in every block; of E2B and E4B see
test_gemma4_edge.py. Softmaxes of attention whose scale is 1 are steep, so that the last bit of a weight shows in the
result: the tolerance is what noise of 1e-7 on every weight changes, measured here on the same model and batch.

Measured, of 31B and 26B-A4B with six blocks, relative to the largest number of its kind: hidden states,
logits, gradients of all weights, of the adapter
    31B      noise of 1e-7 on the weights    2.0e-6  2.4e-6  7.0e-6  1.2e-5
             ours against transformers 5.23  1.3e-6  1.6e-6  3.3e-6  5.7e-6, logits decoded with caches 1.3e-6
             ours against keras-hub 0.32     1.1e-6  1.1e-6  2.9e-6  9.2e-6
    26B-A4B  noise                           2.3e-6  3.0e-6  8.0e-6  1.5e-5
             ours against transformers       1.6e-6  1.8e-6  5.9e-6  1.7e-5, logits decoded with caches 1.4e-6
             ours against keras-hub          1.7e-6  1.7e-6  6.2e-6  1.1e-5
    E2B      noise                           1.1e-5  1.6e-5  2.7e-4  3.2e-4
             ours against transformers       2.6e-6  4.3e-6  7.1e-5  3.2e-5, logits decoded with caches 6.6e-6
             ours against keras-hub          3.1e-6  4.6e-6  4.8e-5  6.9e-5
    E4B      noise                           2.0e-6  3.3e-6  1.3e-5  1.5e-5
             ours against transformers       1.2e-6  1.7e-6  1.5e-5  1.7e-5, logits decoded with caches 1.2e-6
             ours against keras-hub          9.5e-7  1.7e-6  5.4e-6  9.3e-6
The loss differs by its last bit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import pytest

from stages.core.load.variants import LoadedModel
from tests.support.hf_folder import config_of, tensors_of
from tests.support.passes import decoding_of, forward_of, logits, step_of
from tests.support.tiny_models import keras_inputs, load_tiny, sequences, values_of
from tests.support.tiny_presets import EDGE, EXPERTS, write_tiny_preset

LARGE = {"num_layers": 3, "sliding_window_pattern": 3, "num_query_heads": 8, "num_key_value_heads": 4}
SHAPES = {"31B": LARGE, "26B-A4B": {**LARGE, **EXPERTS}, **EDGE}
LENGTH, WINDOW, READ_AT_ONCE = 48, 8, 13
RANK, ALPHA = 2, 4.0
READERS = ("transformers", "keras-hub")
NOISE, SEEDS, MARGIN = 1e-7, 3, 2.0
"""Of the weights' noise, how often it is drawn, and by what a difference may be above the largest that it made."""

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass
class Said:
    """What a model says of a batch: hidden states and logits (tokens, ...), the loss, and gradients by weight."""

    hidden: np.ndarray
    logits: np.ndarray
    loss: float
    gradients: Arrays


def parts(said: Said) -> dict[str, np.ndarray]:
    """All of it, by name."""
    return {"hidden": said.hidden, "logits": said.logits, "loss": np.array(said.loss), **said.gradients}


def differences(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """Of each part the largest difference, relative to its largest number."""
    assert one.keys() == other.keys()
    return {name: float(np.abs(one[name] - other[name]).max() / np.abs(other[name]).max()) for name in one}


def worst(found: dict[str, float]) -> dict[str, float]:
    """Of gradients only the worst: the noise of one matrix is no measure, and that of all is."""
    kinds = {name: name if name in ("hidden", "logits", "loss") else "gradients" for name in found}
    return {kind: max(found[name] for name in found if kinds[name] == kind) for kind in kinds.values()}


# --- The model under test. ---


@pytest.fixture(scope="module", params=SHAPES)
def shape(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(devices, tmp_path_factory, shape) -> Path:
    return write_tiny_preset(tmp_path_factory.mktemp(shape), "gemma4", **SHAPES[shape])


@pytest.fixture(scope="module")
def models(folder, shape) -> dict[str, LoadedModel]:
    """Trained in full, and with an adapter on every projection of the blocks."""
    targets = ("attention/.*", "ffw_.*", *(("per_layer_.*",) if shape in EDGE else ()))
    return {name: load_tiny(folder, (1, 1), rank=rank, targets=targets) for name, rank in (("full", 0), ("lora", RANK))}


@pytest.fixture(scope="module")
def batch() -> Arrays:
    """Rows of two texts each, three times as long as the window."""
    made = sequences(2, LENGTH)
    assert LENGTH // 2 == 3 * WINDOW
    return made


def merged(values: Arrays) -> Arrays:
    """The weights with the adapter in them."""
    found = {path: each for path, each in values.items() if "lora" not in path}
    for path in found:
        if (a := path.replace("/kernel", "/lora_kernel_a")) in values and a != path:
            found[path] = found[path] + ALPHA / RANK * values[a] @ values[a[:-1] + "b"]
    return found


@pytest.fixture(scope="module")
def ours(models, batch) -> dict[str, Callable[[], dict[str, np.ndarray]]]:
    """What each model says of the batch, and decodes, with the weights that it has then."""

    def computing(model: LoadedModel) -> Callable[[], dict[str, np.ndarray]]:
        forward, step = forward_of(model), step_of(model)

        def say() -> dict[str, np.ndarray]:
            hidden = forward(batch).reshape(-1, model.backbone.hidden_dim)
            return parts(Said(hidden, logits(model, hidden), *step(batch)))

        return say

    rows, model = apart(batch)["token_ids"], models["full"]
    decode = decoding_of(model, np.zeros(len(rows), np.int32), READ_AT_ONCE)
    found = {name: computing(model) for name, model in models.items()}
    return found | {
        "decoded": lambda: {"logits": logits(model, np.concatenate([hidden for hidden, _ in decode(rows)]))}
    }


@pytest.fixture(scope="module")
def noise(models, ours) -> Callable[[str], dict[str, float]]:
    """What a weight's last bit changes: the largest of several draws."""

    @functools.cache
    def measured(name: str) -> dict[str, float]:
        exact, draws = ours[name](), []
        for seed in range(SEEDS):
            with perturbed(models["full" if name == "decoded" else name], seed):
                draws.append(worst(differences(ours[name](), exact)))
        return {kind: max(draw[kind] for draw in draws) for kind in draws[0]}

    return measured


class perturbed:
    """Within the block each weight of a model is multiplied by one and noise."""

    def __init__(self, model: LoadedModel, seed: int) -> None:
        self._model, self._random, self._held = model, np.random.default_rng(seed), values_of(model)

    def __enter__(self) -> None:
        for variable in self._model.backbone.weights:
            factor = 1 + NOISE * self._random.standard_normal(variable.shape)
            variable.assign((self._held[variable.path] * factor).astype("f4"))

    def __exit__(self, *_: object) -> None:
        for variable in self._model.backbone.weights:
            variable.assign(self._held[variable.path])


# --- Those who read the same weights. ---


def apart(batch: Arrays) -> Arrays:
    """The packed texts as rows of their own."""
    return {name: each.reshape(-1, LENGTH // 2) for name, each in batch.items()}


@pytest.fixture(scope="module")
def torch_model(folder, tmp_path_factory) -> Callable[[Arrays], Any]:
    """Transformers' model with given weights."""
    # torch's compiler, which nothing here uses, ends the process where TensorFlow has been imported before it.
    sys.modules.setdefault("triton", None)
    torch = pytest.importorskip("torch", reason="needs torch (requirements-readers.txt)")
    transformers = pytest.importorskip("transformers", reason="needs transformers (requirements-readers.txt)")
    arguments = json.loads((folder / "config.json").read_text())["config"]
    written = tmp_path_factory.mktemp("hf")
    (written / "config.json").write_text(json.dumps(config_of("gemma4", arguments)))
    config = transformers.AutoConfig.from_pretrained(written)
    # Its grouped products of experts take no rows as short as those of a tiny model.
    config._experts_implementation = "eager"

    def make(values: Arrays) -> Any:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        tensors = {name: torch.tensor(value) for name, value in tensors_of("gemma4", values).items()}
        report = model.load_state_dict(tensors, strict=False)
        assert report.missing_keys == ["lm_head.weight"] and not report.unexpected_keys
        model.tie_weights()
        return model

    return make


def transformers_says(make: Callable[[Arrays], Any], values: Arrays, batch: Arrays) -> Said:
    import torch

    model, rows = make(values), apart(batch)
    ids = torch.tensor(rows["token_ids"]).long()
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    z = model(input_ids=ids, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        z.flatten(0, 1), torch.tensor(rows["target_ids"]).long().flatten(), reduction="none"
    )
    weights = torch.tensor(rows["weights"]).flatten()
    # Keras' mean with weights divides by the number of tokens whose weight is not masked out: by their sum.
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    named = dict(model.named_parameters())
    gradients = {}
    for path, value in values.items():
        if path.endswith("layer_scalar"):
            continue
        joined = {path, path.replace("gate_proj", "up_proj"), path.replace("up_proj", "gate_proj")}
        (name,) = tensors_of("gemma4", {each: values[each] for each in joined})
        gradients[path] = as_keras(path, named[name].grad.numpy(), value.shape)
    return Said(
        *(each.detach().flatten(0, 1).numpy() for each in (hidden, z)), loss=float(loss.detach()), gradients=gradients
    )


def as_keras(path: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of transformers' in the shape of keras-hub's weight."""
    if "attention_output" in path:
        heads, head, hidden = shape
        return tensor.reshape(hidden, heads, head).transpose(1, 2, 0)
    if "moe_expert_bank" in path and len(shape) == 3:
        start = shape[2] if path.endswith("up_proj") else 0
        return tensor[:, start : start + shape[2]].transpose(0, 2, 1)
    if len(shape) == 3:
        heads, hidden, head = shape
        return tensor.reshape(heads, head, hidden).transpose(0, 2, 1)
    return tensor.T if path.endswith("kernel") else tensor


@pytest.fixture(scope="module")
def keras_hub_says(folder, batch) -> Callable[[Arrays], Said]:
    """What keras-hub's model says with given weights."""
    import keras_hub

    keras.distribution.set_distribution(None)
    backbone = keras_hub.models.Backbone.from_preset(str(folder), dtype="float32")
    trained, others = backbone.trainable_variables, backbone.non_trainable_variables
    rows = apart(batch)
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")

    def loss(trainable, rest):
        mapping = [*zip(trained, trainable, strict=True), *zip(others, rest, strict=True)]
        with keras.StatelessScope(state_mapping=mapping):
            hidden = backbone(keras_inputs(backbone, rows["token_ids"]))
            z = backbone.token_embedding(hidden, reverse=True)
            return entropy(rows["target_ids"], z, sample_weight=rows["weights"]), (hidden, z)

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def says(values: Arrays) -> Said:
        for variable in backbone.weights:
            variable.assign(values[variable.path])
        (value, said), gradients = compiled([each.value for each in trained], [each.value for each in others])
        by_path = {each.path: np.asarray(gradient) for each, gradient in zip(trained, gradients, strict=True)}
        hidden, z = (np.asarray(each).reshape(-1, each.shape[-1]) for each in said)
        return Said(hidden, z, float(value), by_path)

    return says


@pytest.fixture
def read(request, batch) -> Callable[[Arrays], Said]:
    """What the reader that a test names says of weights."""
    if request.param == "keras-hub":
        return request.getfixturevalue("keras_hub_says")
    make = request.getfixturevalue("torch_model")
    return lambda values: transformers_says(make, values, batch)


# --- The same. ---


@pytest.mark.parametrize("read", READERS, indirect=True)
def test_packed_texts_longer_than_the_window_are_computed_as_each_alone_and_all_weights_have_its_gradients(
    read, models, ours, noise
):
    said = read(values_of(models["full"]))
    found = worst(differences(ours["full"](), parts(said)))
    assert_within(found, noise("full"))


@pytest.mark.parametrize("read", READERS, indirect=True)
def test_an_adapter_has_the_gradients_that_follow_from_those_of_the_merged_weights(read, models, ours, noise):
    values = values_of(models["lora"])
    said = read(merged(values))
    assert sum("value/lora" in path for path in values) == 2 * sum(path.endswith("value/kernel") for path in values)
    gradients = {}
    for path in values:
        if path.endswith("lora_kernel_a"):
            b = path[:-1] + "b"
            whole = ALPHA / RANK * said.gradients[path.replace("lora_kernel_a", "kernel")]
            gradients[path] = whole @ values[b].T
            axes = (list(range(whole.ndim - 1)),) * 2
            gradients[b] = np.tensordot(values[path], whole, axes)
    said = dataclasses.replace(said, gradients=gradients)
    found = worst(differences(ours["lora"](), parts(said)))
    assert_within(found, noise("lora"))


def test_decoding_with_a_cache_gives_the_logits_that_transformers_decodes_with_its_own(
    torch_model, models, ours, batch, noise
):
    import torch

    model, ids = torch_model(values_of(models["full"])), torch.tensor(apart(batch)["token_ids"]).long()
    steps, cache = [], None
    with torch.no_grad():
        for part in (ids[:, :READ_AT_ONCE], *ids[:, READ_AT_ONCE:].split(1, dim=1)):
            said = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = said.past_key_values
            steps.append(said.logits[:, -1].numpy())
    found = differences(ours["decoded"](), {"logits": np.concatenate(steps)})
    assert_within(found, noise("decoded"))


def assert_within(found: dict[str, float], noise: dict[str, float]) -> None:
    """No difference is larger than what the weights' last bit makes."""
    print({kind: f"{found[kind]:.1e} (noise {noise[kind]:.1e})" for kind in found})
    assert found.keys() == noise.keys()
    # Noise can leave the last bits of a single number as they are, of a loss those that the order of its sum makes.
    least = 2 * float(np.finfo(np.float32).eps)
    assert all(found[kind] <= MARGIN * max(noise[kind], least) for kind in found), (found, noise)
