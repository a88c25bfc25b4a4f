"""What this project needs of Keras and keras-hub and they keep private: the one module that names it.

Purpose: a new release of either may rename any of this; then the mend is here. tests/pipeline/test_private_names.py
holds all other modules to public names. (JAX's private names are in program_cache.py.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import keras
from keras.src.backend.common import dtypes, global_state


@contextlib.contextmanager
def declared_only() -> Iterator[None]:
    """Within this block new Keras variables get a shape, a dtype and a path, and no value.

    `from_preset` would fill them with random numbers first and throw these away. Keras keeps a list of such variables
    and would initialise them when any later stateless scope ends, so they are taken off it.
    """
    before = list(global_state.get_global_attribute("uninitialized_variables", [], set_to_default=True))
    with keras.StatelessScope(initialize_variables=False):
        yield
    global_state.set_global_attribute("uninitialized_variables", before)


def set_value(variable: keras.Variable, value: jax.Array) -> None:
    """Give a variable an array that is sharded already; `assign` would shard it once more."""
    variable._value = value


def place(variable: keras.Variable, value: jax.Array, sharding: jax.sharding.Sharding) -> None:
    """Give a declared variable its value and its sharding.

    The latter is what Keras consults when it derives others from it: optimizer slots get their weight's.
    """
    variable._layout = sharding
    variable._value = value
    variable._initializer = None


@contextlib.contextmanager
def slots_split_as(
    shardings: Mapping[str, jax.sharding.Sharding], variables: Sequence[keras.Variable]
) -> Iterator[None]:
    """Within this block an optimizer makes the slots of some variables in shardings other than the variables' own.

    Args:
        shardings: by the variable's path.
        variables: those that are trained.
    """
    own = [variable._layout for variable in variables]
    try:
        for variable in variables:
            variable._layout = shardings.get(variable.path, variable._layout)
        yield
    finally:
        for variable, sharding in zip(variables, own, strict=True):
            variable._layout = sharding


def kernel_of(layer: Any) -> keras.Variable:
    """Return a layer's kernel as it is stored: `kernel` would be W + AB where LoRA is enabled."""
    return layer._kernel


def embedding_table(backbone: keras.Model) -> keras.Variable:
    """Return the variable of a backbone's token embeddings, which are its output head too."""
    return backbone.token_embedding._embeddings


def layer_table(backbone: keras.Model) -> Any:
    """Return the layer with the table of a token's numbers for each block, or None where the model has none."""
    return getattr(backbone, "per_layer_token_embedding", None)


def table_within(layer: Any) -> keras.Variable:
    """Return the variable of a layer of embeddings."""
    return layer._embeddings


def equation_of(layer: Any) -> str:
    """Return the product that a linear layer computes; Keras' `Dense` does not name its own."""
    return getattr(layer, "equation", "btd,df->btf")


def declare_codes(
    layer: Any, variable: keras.Variable, dtype: str, scale_shape: tuple[int, ...], beside: Mapping[str, str]
) -> None:
    """Make a declared weight one of codes, and declare beside it what turns codes into values.

    To be called within `declared_only`.

    Args:
        layer: that the weight belongs to.
        variable: its kernel or table of embeddings.
        dtype: of the codes. Keras has no type of 4 bits; JAX has, and holds two numbers in a byte.
        scale_shape: of what is beside it.
        beside: its dtypes, by what follows the weight's name: `scale`, which is Keras' own name.
    """
    if dtype not in dtypes.ALLOWED_DTYPES:
        dtypes.ALLOWED_DTYPES = (*dtypes.ALLOWED_DTYPES, dtype)
    variable._dtype, variable.trainable = dtype, False
    layer._tracker.unlock()
    for name, kind in beside.items():
        name = f"{variable.name}_{name}"
        setattr(layer, name, layer.add_weight(name=name, shape=scale_shape, dtype=kind, trainable=False))
    layer._tracker.lock()


def layers_within(backbone: keras.Model) -> list[keras.layers.Layer]:
    """Return the layers of a model at every depth."""
    return list(backbone._flatten_layers(include_self=False))


def make_metrics(model: keras.Model, data: Any) -> None:
    """Make the variables of a compiled model's metrics, which else come with the first batch.

    Args:
        model: compiled.
        data: a batch, as arrays or their shapes and dtypes.
    """
    model._symbolic_build(data_batch=jax.tree.map(lambda each: keras.KerasTensor(each.shape, str(each.dtype)), data))


def update_metrics(
    model: keras.Model, metrics: Any, loss: jax.Array, x: Any, y_pred: Any
) -> tuple[dict[str, jax.Array], Any]:
    """Return the logs of a batch without targets and the metrics' new values, as Keras' own train step does."""
    return model._update_metrics_variables(metrics, loss, x, None, y_pred, None)
