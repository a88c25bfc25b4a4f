"""The adapter as PEFT reads it: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from stages.core.common.errors import StageError
from stages.core.export.adapter import LoraModule, common_rank, lora_modules, peft_shapes, peft_tensors
from stages.core.export.safetensors_file import write_safetensors
from stages.core.export.tensors import PREFIX
from stages.core.export.tuned import SeparateWeights, Tuned
from stages.core.files import write_json
from stages.core.presets.architecture import Architecture
from stages.core.presets.formats import WeightSource
from stages.core.presets.untrusted import read_object
from stages.core.presets.weight_table import StoredWeight

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BEFORE = "base_model.model."
"""What PEFT writes before the names of the base's modules."""
TOWERS = {"text": PREFIX, "vision": f"{PREFIX}language_model."}
"""Where a base has the text model: alone, or within a Gemma3ForConditionalGeneration (Google's 4B and larger)."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be (vllm/config/lora.py); its default is 16."""


def vllm_rank(rank: int) -> int | None:
    """Return the --max-lora-rank that vLLM needs for an adapter, None where none is large enough."""
    return next((each for each in VLLM_RANKS if each >= rank), None)


def target_modules(modules: list[LoraModule], blocks: int, base: str) -> list[str]:
    """Return PEFT's `target_modules`: names of layers where every block has them, else each by itself.

    A vision tower has layers of the same names, so that beside one each is named with the text model's.
    """
    by_layer = defaultdict(list)
    for module in modules:
        by_layer[module.name.rpartition(".")[2]].append(module)
    if base == "text" and all(len(found) == blocks for found in by_layer.values()):
        return list(by_layer)
    before = "language_model." if base == "vision" else ""
    return [before + module.name.removeprefix(PREFIX) for module in modules]


def adapter_config(modules: list[LoraModule], architecture: Architecture, base: str, named: str) -> dict[str, Any]:
    """Return the content of `adapter_config.json`.

    Args:
        modules: with an adapter.
        architecture: of the base.
        base: `text` or `vision`, see `TOWERS`.
        named: the base's name at Hugging Face, or of its folder.
    """
    rank = common_rank(modules)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": named,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": target_modules(modules, architecture.config["num_layers"], base),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def write_adapter(folder: Path, tuned: Tuned, base: str, named: str) -> None:
    """Write the adapter.

    Args:
        folder: to write to; made if it is not there.
        tuned: a variant with an adapter.
        base: `text` or `vision`.
        named: the base's name.

    Raises:
        OSError: the disk is full, or a file cannot be written.
    """
    modules = lora_modules(tuned)

    def name(tensor: str) -> str:
        return BEFORE + TOWERS[base] + tensor.removeprefix(PREFIX)

    shapes = {name(each): shape for each, shape in peft_shapes(modules).items()}
    tensors = ((name(each), values) for each, values in peft_tensors(tuned, modules))
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / WEIGHTS, shapes, np.dtype(np.float32), tensors)
    write_json(folder / CONFIG, adapter_config(modules, tuned.preset.architecture, base, named))


@contextlib.contextmanager
def read_adapter(
    folder: Path, architecture: Architecture, base: SeparateWeights
) -> Iterator[tuple[Architecture, WeightSource]]:
    """Yield the base's architecture, and its weights with the written adapter merged in as PEFT merges it.

    Args:
        folder: of the adapter.
        architecture: of the base.
        base: its weights.

    Raises:
        StageError: the adapter has a matrix that no layer of the base takes.
    """
    with safe_open(folder / WEIGHTS, framework="np") as file:
        yield architecture, _Applied(base, file, read_object(folder / CONFIG))


class _Applied:
    """A base's weights with an adapter of PEFT's on them: W + (lora_alpha / r) lora_B lora_A."""

    def __init__(self, base: SeparateWeights, file: Any, config: dict[str, Any]) -> None:
        self._base, self._file, self._table = base, file, base.table
        self._scale = np.float32(config["lora_alpha"] / config["r"])
        names = {name.removeprefix(BEFORE).rpartition(".lora_")[0] for name in file.keys()}  # noqa: SIM118
        tower = max(TOWERS.values(), key=lambda tower: (all(name.startswith(tower) for name in names), len(tower)))
        modules = {tower + each.hugging_face.removesuffix(".weight"): path for path, each in base.table.items()}
        if unknown := names - modules.keys():
            raise StageError(f"An adapter must be of layers that the base has. Received: {min(unknown)}")
        self._modules = {modules[name]: name for name in names}

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of the whole weight."""
        return self._table[path].shape

    def read(self, path: str, index: tuple[slice, ...]) -> np.ndarray:
        """Return a slice of a weight, float32."""
        base = self._base.read(path, index)
        if path not in self._modules:
            return base
        weight, name = self._table[path], BEFORE + self._modules[path]
        matrix = self._file.get_tensor(f"{name}.lora_B.weight") @ self._file.get_tensor(f"{name}.lora_A.weight")
        return base + self._scale * as_keras(weight, matrix)[index]


def as_keras(weight: StoredWeight, matrix: np.ndarray) -> np.ndarray:
    """Return a matrix (outputs, inputs) in keras-hub's shape of the weight: the inverse of `as_matrix`."""
    if weight.kind == "heads_out":
        heads, hidden, head = weight.shape
        return matrix.reshape(heads, head, hidden).transpose(0, 2, 1)
    if weight.kind == "heads_in":
        heads, head, hidden = weight.shape
        return matrix.reshape(hidden, heads, head).transpose(1, 2, 0)
    return matrix.T if weight.kind == "transposed" else matrix
