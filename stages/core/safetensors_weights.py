"""Reading Gemma from a Hugging Face folder (safetensors) as keras-hub names and shapes it, in slices.

Purpose: a checkpoint in the form most people hold it in. Only the slice that a device needs is read.
Reads: `config.json` with `model_type` gemma, gemma2, gemma3_text, or gemma3 (its text tower alone), and
`model.safetensors`, or the files that `model.safetensors.index.json` names.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.core.errors import StageError

if TYPE_CHECKING:
    import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# What has been read of a mapped file stays in this process's memory until the file is closed: after so many bytes.
BYTES_AN_OPENING = 1 << 26

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text", "gemma3")

# What a Gemma 3 configuration leaves out when it is the library's own default.
# Source: Gemma3TextConfig of https://github.com/huggingface/transformers.
GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

# Where the text tower's tensors lie, by what their names begin with; transformers has changed this over the years.
PREFIXES = ("model.", "", "model.language_model.", "language_model.model.")

# keras-hub fixes the wavelengths of rotary embeddings: of Gemma and Gemma 2, and of Gemma 3's windowed layers; and of
# Gemma 3's other layers.
LOCAL_WAVELENGTH, GLOBAL_WAVELENGTH = 1.0e4, 1.0e6


class _Tensor(NamedTuple):
    """Where a Keras weight comes from: tensor, the Keras shape, and the kind of conversion."""

    name: str
    shape: tuple[int, ...]
    kind: str


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the model type and the text model's configuration.

    Raises:
        StageError: no readable `config.json`, or another model.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError(f"A Hugging Face folder must hold a readable config.json ({error}).") from error
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise StageError(f"The model must be a text Gemma ({', '.join(MODEL_TYPES)}). Received: model_type={kind}.")
    if kind == "gemma3":
        config = config.get("text_config")
        if not isinstance(config, dict):
            raise StageError(f"A gemma3 configuration must hold a text_config. Received: none in {path}.")
    return kind, {**GEMMA3_DEFAULTS, **config} if kind.startswith("gemma3") else config


def read_architecture(folder: Path) -> dict[str, Any]:
    """Return `{"class_name": ..., "config": {...}}`: the arguments of keras-hub's backbone, but for dtype.

    Raises:
        StageError: the configuration lacks something, or has something that keras-hub's Gemma cannot express.
    """
    kind, config = read_config(folder)

    def need(key: str) -> Any:
        if config.get(key) is None:
            raise StageError(f"The configuration of a {kind} must state {key}, and does not. Received: {folder}.")
        return config[key]

    def refuse(key: str, allowed: Any, received: Any) -> None:
        raise StageError(
            f"keras-hub's Gemma can only have {key}={allowed}. Received: {key}={received} in {folder / 'config.json'}."
        )

    # An old Gemma says "gelu" in hidden_act, which transformers takes for the tanh form too.
    if (activation := config.get("hidden_activation")) not in (None, "gelu_pytorch_tanh"):
        refuse("hidden_activation", "gelu_pytorch_tanh", activation)
    for key, allowed in (("attention_bias", False), ("tie_word_embeddings", True)):
        if (value := config.get(key)) not in (None, allowed):
            refuse(key, allowed, value)
    if value := config.get("use_bidirectional_attention"):
        refuse("use_bidirectional_attention", False, value)

    heads, hidden, head_dim = need("num_attention_heads"), need("hidden_size"), need("head_dim")
    layers, feed_forward = need("num_hidden_layers"), need("intermediate_size")
    gemma3 = kind.startswith("gemma3")
    arguments: dict[str, Any] = {
        "vocabulary_size": need("vocab_size"),
        "num_layers": layers,
        "num_query_heads": heads,
        "num_key_value_heads": need("num_key_value_heads"),
        "hidden_dim": hidden,
        # GemmaBackbone counts both gate matrices, Gemma3Backbone counts one.
        "intermediate_dim": feed_forward if gemma3 else 2 * feed_forward,
        "head_dim": head_dim,
        "layer_norm_epsilon": config.get("rms_norm_eps") or 1e-6,
    }
    if kind != "gemma":
        scalar = need("query_pre_attn_scalar")
        if scalar not in (head_dim, hidden / heads):
            refuse(
                "query_pre_attn_scalar", f"{head_dim} (head_dim) or {hidden / heads:g} (hidden_size / heads)", scalar
            )
        period = 6 if gemma3 else 2
        pattern = ["full_attention" if (index + 1) % period == 0 else "sliding_attention" for index in range(layers)]
        if (types := config.get("layer_types")) not in (None, pattern):
            refuse("layer_types", f"every {period}th full_attention", types)
        if (given := config.get("sliding_window_pattern")) not in (None, period):
            refuse("sliding_window_pattern", period, given)
        arguments |= {
            "query_head_dim_normalize": scalar == head_dim,
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
            "final_logit_soft_cap": config.get("final_logit_softcapping"),
            "attention_logit_soft_cap": config.get("attn_logit_softcapping"),
            "use_sliding_window_attention": True,
            "sliding_window_size": need("sliding_window"),
        }
    rope = _rope(config, gemma3)
    for layer_kind, (wavelength, factor, form) in rope.items():
        wanted = GLOBAL_WAVELENGTH if layer_kind == "full_attention" and gemma3 else LOCAL_WAVELENGTH
        if wavelength != wanted:
            refuse(f"rope_theta of {layer_kind}", f"{wanted:g}", wavelength)
        if form not in (None, "default", "linear") or (factor != 1.0 and not gemma3):
            refuse(f"rope scaling of {layer_kind}", "linear for Gemma 3 and none for others", f"{form} by {factor}")
    if gemma3:
        arguments |= {
            "image_size": 896,
            "vision_encoder": None,
            "local_rope_scaling_factor": rope["sliding_attention"][1],
            "global_rope_scaling_factor": rope["full_attention"][1],
        }
    return {"class_name": "Gemma3Backbone" if gemma3 else "GemmaBackbone", "config": arguments}


def _rope(config: dict[str, Any], gemma3: bool) -> dict[str, tuple[float, float, str | None]]:
    """Return wavelength, scaling factor and form of the rotary embeddings, by kind of layer.

    transformers 5 writes `rope_parameters` (for Gemma 3 one for each kind of layer); before, there were `rope_theta`,
    `rope_local_base_freq` and `rope_scaling`, the last for Gemma 3's full layers only.
    """
    newer = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    whole = {
        "rope_theta": config.get("rope_theta") or (GLOBAL_WAVELENGTH if gemma3 else LOCAL_WAVELENGTH),
        **scaling,
    }
    windowed = {"rope_theta": config.get("rope_local_base_freq") or LOCAL_WAVELENGTH} if gemma3 else whole
    found = {
        "full_attention": {**whole, **(newer.get("full_attention", {}) if gemma3 else newer)},
        "sliding_attention": {**windowed, **(newer.get("sliding_attention", {}) if gemma3 else newer)},
    }
    return {
        kind: (each["rope_theta"], float(each.get("factor") or 1.0), each.get("rope_type") or each.get("type"))
        for kind, each in found.items()
    }


def shard_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the weight files: the single one, or those that the index names.

    Raises:
        StageError: neither is there, or the index cannot be read.
    """
    if (folder / SINGLE).is_file():
        return (SINGLE,)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = tuple(sorted(set(index["weight_map"].values())))
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{outside[0]} does not lie beside it")
        return names
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError(
            f"A Hugging Face folder must hold {SINGLE}, or {INDEX} with a weight_map. Received: {folder} ({error})."
        ) from error


class SafetensorsWeights:
    """The weights of a Hugging Face folder under keras-hub's weight paths and in its shapes, read slice by slice."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files and check that every weight is there; no weight is read yet.

        Raises:
            StageError: a file is missing or damaged, a tensor is missing or has another shape.
        """
        # Gives numpy the dtype bfloat16, which most checkpoints are in.
        import ml_dtypes  # noqa: F401

        self._folder = folder
        self._file_of: dict[str, str] = {}
        self._opened: tuple[str, Any] | None = None
        self._bytes_read = 0
        shapes: dict[str, tuple[int, ...]] = {}
        for file in shard_files(folder):
            with self._open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (the file is no mapping)
                    self._file_of[name] = file
                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        kind, _ = read_config(folder)
        prefix = next((each for each in PREFIXES if f"{each}embed_tokens.weight" in shapes), PREFIXES[0])
        self._table = _table(read_architecture(folder)["config"], prefix, kind)
        for path, tensor in self._table.items():
            if tensor.name not in shapes:
                raise StageError(
                    f"The weight files must hold {tensor.name} (for {path}), and do not. Received: folder={folder}. "
                    "Download the checkpoint again."
                )
            if shapes[tensor.name] != (wanted := _stored_shape(tensor)):
                raise StageError(
                    f"The tensor {tensor.name} (for {path}) must have the shape {wanted} that config.json gives it. "
                    f"Received: shape={shapes[tensor.name]} in {self._file_of[tensor.name]}."
                )

    def shape(self, path: str) -> tuple[int, ...]:
        """Return a weight's Keras shape, without reading it."""
        return self._table[path].shape

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice (steps of 1) of a weight in Keras' shape and the file's dtype; only that slice is read."""
        values = self._read(path, index)
        self._bytes_read += values.nbytes
        return values

    def _read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        import numpy as np

        name, shape, kind = self._table[path]
        stored = self._slices(self._file_of[name]).get_slice(name)
        cuts = [slice(*cut.indices(size)[:2]) for cut, size in zip(index, shape, strict=True)]
        if kind == "same":
            return stored[tuple(cuts)]
        if kind == "transposed":
            return stored[cuts[1], cuts[0]].T
        # A head's rows (or columns) lie together in a matrix of PyTorch's order, outputs x inputs.
        heads = range(cuts[0].start, cuts[0].stop)
        if kind == "heads_first":
            size, within, hidden = shape[2], cuts[2], cuts[1]
            parts = [stored[head * size + within.start : head * size + within.stop, hidden] for head in heads]
        else:
            size, within, hidden = shape[1], cuts[1], cuts[2]
            parts = [stored[hidden, head * size + within.start : head * size + within.stop] for head in heads]
        return np.stack(parts).transpose(0, 2, 1)

    def close(self) -> None:
        """Close the file that is open."""
        if self._opened:
            self._opened[1].__exit__(None, None, None)
            self._opened = None

    def _slices(self, file: str) -> Any:
        """Return the open file."""
        if self._opened is None or self._opened[0] != file or self._bytes_read > BYTES_AN_OPENING:
            self.close()
            self._bytes_read = 0
            self._opened = (file, self._open(file).__enter__())
        return self._opened[1]

    def _open(self, file: str) -> Any:
        """Open a file (memory-mapped)."""
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self._folder / file, framework="np")
        except (OSError, SafetensorError) as error:
            raise StageError(
                f"The weights file {file} must be a complete safetensors file ({error}). Received: "
                f"folder={self._folder}. Download it again."
            ) from error


def _table(config: dict[str, Any], prefix: str, kind: str) -> dict[str, _Tensor]:
    """Return where each Keras weight comes from."""
    hidden, head_dim = config["hidden_dim"], config["head_dim"]
    heads, kv_heads = config["num_query_heads"], config["num_key_value_heads"]
    wide = config["intermediate_dim"] if kind.startswith("gemma3") else config["intermediate_dim"] // 2
    norms = {"pre_attention_norm": "input_layernorm"}
    if kind == "gemma":
        # Gemma's only other norm stands before the feed-forward layers, whatever its name says.
        norms["pre_ffw_norm"] = "post_attention_layernorm"
    else:
        norms["post_attention_norm"] = "post_attention_layernorm"
        norms["pre_ffw_norm"] = "pre_feedforward_layernorm"
        norms["post_ffw_norm"] = "post_feedforward_layernorm"
    block: dict[str, _Tensor] = {
        f"{layer}/scale": _Tensor(f"{name}.weight", (hidden,), "same") for layer, name in norms.items()
    }
    if kind.startswith("gemma3"):
        block["attention/query_norm/scale"] = _Tensor("self_attn.q_norm.weight", (head_dim,), "same")
        block["attention/key_norm/scale"] = _Tensor("self_attn.k_norm.weight", (head_dim,), "same")
    for layer, name, count in (("query", "q_proj", heads), ("key", "k_proj", kv_heads), ("value", "v_proj", kv_heads)):
        shape = (count, hidden, head_dim)
        block[f"attention/{layer}/kernel"] = _Tensor(f"self_attn.{name}.weight", shape, "heads_first")
    block["attention/attention_output/kernel"] = _Tensor(
        "self_attn.o_proj.weight", (heads, head_dim, hidden), "heads_last"
    )
    block["ffw_gating/kernel"] = _Tensor("mlp.gate_proj.weight", (hidden, wide), "transposed")
    block["ffw_gating_2/kernel"] = _Tensor("mlp.up_proj.weight", (hidden, wide), "transposed")
    block["ffw_linear/kernel"] = _Tensor("mlp.down_proj.weight", (wide, hidden), "transposed")
    table = {
        "token_embedding/embeddings": _Tensor("embed_tokens.weight", (config["vocabulary_size"], hidden), "same"),
        "final_normalization/scale": _Tensor("norm.weight", (hidden,), "same"),
    }
    for number in range(config["num_layers"]):
        for path, tensor in block.items():
            table[f"decoder_block_{number}/{path}"] = tensor._replace(name=f"layers.{number}.{tensor.name}")
    return {path: tensor._replace(name=prefix + tensor.name) for path, tensor in table.items()}


def _stored_shape(tensor: _Tensor) -> tuple[int, ...]:
    """Return the shape that the tensor has in the file."""
    if tensor.kind == "heads_first":
        heads, hidden, head_dim = tensor.shape
        return (heads * head_dim, hidden)
    if tensor.kind == "heads_last":
        heads, head_dim, hidden = tensor.shape
        return (hidden, heads * head_dim)
    return tensor.shape[::-1] if tensor.kind == "transposed" else tensor.shape
