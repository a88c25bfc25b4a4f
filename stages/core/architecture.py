"""A Gemma's shape without its weights: the backbone's class and arguments, and a backbone that allocates nothing.

Purpose: everything about a preset that layouts, loading and planning need before a byte of weights is read.
Reads: `config.json` of a keras-hub preset or of a Hugging Face folder, or the metadata of a GGUF file.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stages.core.errors import StageError

if TYPE_CHECKING:
    import keras

# Far above any Gemma, and low enough that no table over layers or rows of a mistaken preset fills the memory.
Layers = Annotated[int, Field(ge=1, le=512)]
Heads = Annotated[int, Field(ge=1, le=1024)]
HeadSize = Annotated[int, Field(ge=2, le=4096, multiple_of=2)]  # rotary embeddings turn pairs
Size = Annotated[int, Field(ge=1, le=1 << 22)]
Positive = Annotated[float, Field(gt=0, le=1e9)]

EPSILON = 1e-6
"""keras-hub builds every block's norms with it, whatever the backbone's argument says."""

LARGEST_JSON = 64 << 20
"""Bytes of a configuration or index; those of the public presets have at most some 100,000."""

FLOATS = ("float32", "bfloat16", "float16", "float64", "mixed_bfloat16", "mixed_float16")


class Typed(BaseModel):
    """A part of a configuration in which every key is known and has the type that it must have."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


T = TypeVar("T", bound=Typed)


class _Gemma(Typed):
    """The arguments of keras-hub's GemmaBackbone, as far as `decoder.py` computes what they say."""

    vocabulary_size: Size
    num_layers: Layers
    num_query_heads: Heads
    num_key_value_heads: Heads
    hidden_dim: Size
    intermediate_dim: Size
    head_dim: HeadSize
    query_head_dim_normalize: bool = True
    use_post_ffw_norm: bool = False
    use_post_attention_norm: bool = False
    attention_logit_soft_cap: Positive | None = None
    final_logit_soft_cap: Positive | None = None
    use_sliding_window_attention: bool = False
    sliding_window_size: Size = 4096
    layer_norm_epsilon: Positive = EPSILON
    dropout: float = 0


class _Gemma3(_Gemma):
    """The arguments of Gemma3Backbone."""

    image_size: Size | None = None
    use_query_key_norm: bool = True
    local_rope_scaling_factor: Positive = 1.0
    global_rope_scaling_factor: Positive = 1.0
    vision_encoder: None = None
    use_bidirectional_attention: bool = False
    is_embedding_model: bool = False
    pooling_intermediate_dim: int | None = None
    embedding_dim: int | None = None


BACKBONES: dict[str, type[_Gemma]] = {"GemmaBackbone": _Gemma, "Gemma3Backbone": _Gemma3}

# Keras' own bookkeeping, none of the backbone's arguments; dtype is ours to choose.
BOOKKEEPING = ("name", "trainable", "dtype")


@dataclass(frozen=True)
class Architecture:
    """A keras-hub backbone class by name, and its arguments (without dtype)."""

    class_name: str
    config: dict[str, Any]

    def __post_init__(self) -> None:
        if self.class_name not in BACKBONES:
            raise StageError(
                f"The preset must be a text Gemma ({' or '.join(BACKBONES)}). "
                f"Received: backbone={plain(self.class_name)}."
            )
        if self.config.get("vision_encoder") is not None:
            raise StageError(
                "The preset must be a text model. Received: a Gemma with a vision encoder. Use its _text preset."
            )
        config = parse(BACKBONES[self.class_name], self.config, "The architecture of a Gemma")

        def need(holds: bool, key: str, allowed: str) -> None:
            if not holds:
                raise StageError(
                    f"The architecture of a Gemma that this project runs has {key} {allowed}. "
                    f"Received: {key}={getattr(config, key)}."
                )

        need(
            config.num_query_heads % config.num_key_value_heads == 0,
            "num_query_heads",
            f"a multiple of num_key_value_heads ({config.num_key_value_heads})",
        )
        by_head = config.query_head_dim_normalize or config.hidden_dim % config.num_query_heads == 0
        need(by_head, "hidden_dim", "that its heads divide")
        need(math.isclose(config.layer_norm_epsilon, EPSILON, rel_tol=1e-5), "layer_norm_epsilon", f"{EPSILON:g}")
        need(config.dropout == 0, "dropout", "0 (LoRA has its own: finetune.lora_dropout)")
        if isinstance(config, _Gemma3):
            need(not config.is_embedding_model, "is_embedding_model", "false: an embedding model predicts no tokens")
            for key in ("pooling_intermediate_dim", "embedding_dim"):
                need(getattr(config, key) is None, key, "null: an embedding model predicts no tokens")
            need(not config.use_bidirectional_attention, "use_bidirectional_attention", "false: it looks back only")
        else:
            need(config.intermediate_dim % 2 == 0, "intermediate_dim", "even: it counts both gates")


def parse(schema: type[T], content: Any, what: str) -> T:
    """Return a part of a configuration as its schema.

    Raises:
        StageError: a key is unknown, missing, or has another type or size; names it.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "content"
        if first["type"] == "extra_forbidden":
            raise StageError(
                f"{what} has a key that this project does not know, so that it might compute something else. "
                f"Received: {key}={brief(first['input'])}."
            ) from error
        if first["type"] == "missing":
            raise StageError(f"{what} must state {key}, and does not.") from error
        said = first["msg"].removeprefix("Input ")
        raise StageError(f"{what}: {key} {said}. Received: {key}={brief(first['input'])}.") from error


def brief(value: Any) -> str:
    """Return a value of a stranger's for a message: at most 80 characters, none of them a control character."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.10g}" if abs(value) < 1e300 else "a number without end"
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def plain(text: object) -> str:
    """Return a stranger's words for a message, such as a file's name: at most 200 characters, all of them printable."""
    words = ascii(str(text))[1:-1].replace("\\\\", "\\").replace("\\'", "'")
    return words if len(words) <= 200 else words[:197] + "..."


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file of a preset holds.

    Raises:
        StageError: it cannot be read, is no object, or says one thing twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(content := dict(pairs)) != len(pairs):
            raise ValueError("a key stands there twice")
        return content

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    refuse_pointer(path)
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ValueError(f"it has {size:,} bytes")
        read = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise StageError(f"{path} must be JSON that can be read. Received: {plain(error)}") from error
    if not isinstance(read, dict):
        raise StageError(f"{path} must be a JSON object. Received: {type(read).__name__}")
    return read


def refuse_pointer(path: Path) -> None:
    """Refuse a file that only says where its content lies, or that cannot be read.

    Raises:
        StageError: tells how to bring the content.
    """
    try:
        with path.open("rb") as stream:
            begins = stream.read(64)
    except OSError as error:
        raise StageError(
            f"Every file of a preset must be readable. Received: {plain(path)} ({error.strerror})\n"
            "Mend its permissions, or put the file there."
        ) from error
    if begins.startswith(b"version https://git-lfs.github.com/spec/"):
        raise StageError(
            f"{path} must be the file itself. Received: a Git LFS pointer to it\n"
            "Run `git lfs install` and `git lfs pull` where it was cloned, or download it again."
        )


def read_architecture(folder: Path, file_format: str) -> Architecture:
    """Return the architecture of a preset folder.

    Args:
        folder: the folder with the preset's files.
        file_format: the manifest's: `keras`, `safetensors` (both have a `config.json`) or `gguf` (one `.gguf` file).

    Raises:
        StageError: the preset is not a text Gemma, has something that the forward pass does not compute, or its file
            is not there.
    """
    if file_format == "gguf":
        from stages.core import gguf

        files = sorted(folder.glob("*.gguf"))
        if len(files) != 1:
            raise StageError(
                f"The preset folder must hold one .gguf file. Received: {len(files)} in {folder}. "
                "Run `python -m stages.fetch`."
            )
        found = gguf.read_architecture(files[0])
        return Architecture(found["class_name"], found["config"])
    if file_format == "safetensors":
        from stages.core import safetensors_weights

        found = safetensors_weights.read_architecture(folder)
        return Architecture(found["class_name"], found["config"])
    content = read_object(folder / "config.json")
    if not isinstance(content.get("class_name"), str) or not isinstance(content.get("config"), dict):
        raise StageError(
            f"{folder / 'config.json'} must hold the class_name and config of a backbone. "
            f"Received: keys {plain(', '.join(content))}"
        )
    if unknown := content.keys() - KERAS_KEYS:
        raise StageError(
            f"{folder / 'config.json'} has a key that Keras does not write. Received: {plain(min(unknown))}"
        )
    arguments = content["config"]
    _refuse_quantized(arguments.get("dtype"))
    return Architecture(
        content["class_name"], {key: value for key, value in arguments.items() if key not in BOOKKEEPING}
    )


# What Keras and keras-hub's older presets write beside class and arguments; none of it is read.
KERAS_KEYS = {
    *("module", "class_name", "config", "registered_name", "build_config", "compile_config", "shared_object_id"),
    *("assets", "weights"),
}


def _refuse_quantized(dtype: Any) -> None:
    """Refuse a dtype policy under which the numbers in the file are not the weights.

    Raises:
        StageError: it is none of plain floats.
    """
    name = dtype
    if isinstance(dtype, dict) and dtype.get("class_name") == "DTypePolicy" and isinstance(dtype.get("config"), dict):
        name = dtype["config"].get("name")
    if name is not None and name not in FLOATS:
        raise StageError(
            f"The weights must be plain floats, not quantized: save the preset before `quantize`. "
            f"Received: dtype={brief(dtype)}"
        )


def build_backbone(architecture: Architecture, dtype: str) -> keras.Model:
    """Return the keras-hub backbone with all its variables declared and none allocated.

    Its variables have shapes, dtypes and paths, but no values and no layout: `loading.fill` gives them both.

    Args:
        architecture: class and arguments.
        dtype: a Keras dtype policy name: `float32`, `bfloat16` or `mixed_bfloat16`.
    """
    from stages.core.devices import import_keras_hub

    backbone_class = getattr(import_keras_hub().models, architecture.class_name)
    with declared_only():
        return backbone_class(**architecture.config, dtype=dtype, name="backbone")


@contextlib.contextmanager
def declared_only() -> Iterator[None]:
    """Within this block new Keras variables get a shape, a dtype and a path, and no value.

    `from_preset` would fill them with random numbers first and throw these away. Keras keeps a list of such variables
    and would initialise them when any later stateless scope ends, so they are taken off it.
    """
    import keras
    from keras.src.backend.common import global_state

    before = list(global_state.get_global_attribute("uninitialized_variables", [], set_to_default=True))
    with keras.StatelessScope(initialize_variables=False):
        yield
    global_state.set_global_attribute("uninitialized_variables", before)
