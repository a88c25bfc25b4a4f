"""A keras-hub backbone that allocates nothing: its weights have shapes, dtypes and paths, and no values."""

from __future__ import annotations

import sys
from types import ModuleType

import keras

from stages.core.common.environment import hidden
from stages.core.load import quantizing
from stages.core.presets.architecture import Architecture
from stages.core.records.forms import FORMS, policy_of
from stages.core.sharding.keras_internals import declared_only

OPTIONAL = ("tensorflow", "tensorflow_text", "kagglehub", "pandas")


def build_backbone(architecture: Architecture, dtype: str) -> keras.Model:
    """Return the keras-hub backbone with all its variables declared and none allocated.

    Its variables have shapes, dtypes and paths, but no values and no layout: `loading.fill` gives them both.

    Args:
        architecture: class and arguments.
        dtype: a `load.dtype`: a Keras dtype policy, or one of `records.forms`.
    """
    backbone_class = getattr(import_keras_hub().models, architecture.class_name)
    with declared_only():
        backbone = backbone_class(**architecture.config, dtype=policy_of(dtype), name="backbone")
    if dtype in FORMS:
        quantizing.declare(backbone, FORMS[dtype])
    return backbone


def import_keras_hub() -> ModuleType:
    """Import keras-hub without what it and Keras take for optional: it starts in a third of the time.

    TensorFlow, which only its tokenizers need (ours is the sentencepiece library's), would also print notes and take an
    accelerator's memory away from JAX. kagglehub and pandas are used by `fetch` and `prepare`, which need no Keras.
    """
    if "keras_hub" not in sys.modules:
        with hidden(OPTIONAL):
            import keras_hub

            # Keras looks for TensorFlow, once, when it first writes a config: within this block it finds none.
            keras.dtype_policies.serialize(keras.DTypePolicy("float32"))
    import keras_hub

    return keras_hub
