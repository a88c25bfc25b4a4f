"""A LoRA adapter in PEFT's form, made by any program: read, and held against the preset that it is to be put on.

Reads: `adapter_config.json` and `adapter_model.safetensors`. Source of their meaning: PEFT's `LoraConfig`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open

from stages.core.common.errors import StageError, shown
from stages.core.presets.architecture import Architecture
from stages.core.presets.untrusted import Positive, brief, parse, read_object
from stages.core.presets.weight_table import StoredWeight, weight_table

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
# Where a base has its text model: alone, or within one that sees (the names have changed over the years).
TOWERS = ("model.language_model.", "language_model.model.", "model.")
# What makes of an adapter something else than a sum of products, or goes with other weights than the base's.
UNKNOWN_FORMS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "modules_to_save": ([],),
    "layer_replication": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "alora_invocation_tokens": ([],),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
Rank = Annotated[int, Field(ge=1, le=1 << 16)]


class _Config(BaseModel):
    """The keys of `adapter_config.json` that are read; PEFT adds keys with each version."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)

    base_model_name_or_path: str | None = None
    r: Rank
    lora_alpha: Positive
    use_rslora: bool = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Positive] | None = None
    target_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    exclude_modules: list[str] | str | None = None


class Lora(NamedTuple):
    """The adapter of a linear layer (outputs x inputs): the weight becomes W + scale B A.

    Attributes:
        name: the module's, as PEFT has it.
        weight: the kernel's row of the weight table.
        a: float32 (rank, inputs).
        b: float32 (outputs, rank).
        scale: what their product is multiplied with.
    """

    name: str
    weight: StoredWeight
    a: np.ndarray
    b: np.ndarray
    scale: float


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter that fits a preset.

    Attributes:
        base: what its file calls the base, None where it does not.
        layers: by keras-hub's path of the kernel, in the model's order.
    """

    base: str | None
    layers: dict[str, Lora]


def is_peft(folder: Path) -> bool:
    """Return whether a folder holds an adapter in PEFT's form."""
    return (folder / CONFIG).is_file()


def read_peft(folder: Path, architecture: Architecture, preset: str) -> PeftAdapter:
    """Read an adapter, and hold it against the preset that it is to be put on.

    Args:
        folder: with the two files.
        architecture: of the preset.
        preset: its name, for messages.

    Raises:
        StageError: a file is missing or damaged; it is no plain LoRA; its rank, targets or shapes are not what its
            configuration or the preset says. The message has both.
    """
    content = read_object(folder / CONFIG)
    _refuse_other_forms(content, folder / CONFIG)
    known = {key: value for key, value in content.items() if value is not None}
    config = parse(_Config, known, str(folder / CONFIG))
    tensors = _read_tensors(folder / WEIGHTS)
    made_for = f"(made for {shown(config.base_model_name_or_path or 'an unnamed base')}) in {folder}"
    modules = sorted({name for name, _ in tensors})
    tower = next((each for each in TOWERS if all(name.startswith(f"{each}layers.") for name in modules)), None)
    table = {
        f"{tower}{weight.hugging_face.removesuffix('.weight')}": (path, weight)
        for path, weight in weight_table(architecture).items()
        if weight.is_matrix
    }
    if unknown := [name for name in modules if name not in table]:
        raise StageError(
            f"The adapter must be of linear layers of {preset}, which has {architecture.config['num_layers']} blocks. "
            f"Received: {some(unknown)} {made_for}"
        )
    _check_targets(config, modules, list(table), folder)
    found = {table[name][0]: _lora(name, table[name][1], tensors, config, preset, made_for) for name in modules}
    return PeftAdapter(
        config.base_model_name_or_path, {path: found[path] for path, _ in table.values() if path in found}
    )


def some(names: Iterable[str]) -> str:
    """Return the first of many names of layers, for a message."""
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(shown(name) for name in listed[:3]) + more


def _refuse_other_forms(content: Mapping[str, Any], path: Path) -> None:
    """Refuse an adapter that is more than a sum of products on the base."""
    for key, allowed in UNKNOWN_FORMS.items():
        value = content.get(key)
        if value is not None and not any(value == each and type(value) is type(each) for each in allowed):
            raise StageError(
                f"The adapter must be a plain LoRA, with {key}={allowed[0]}. Received: {key}={brief(value)} in {path}\n"
                "Merge it with PEFT's `merge_and_unload()`, and use the saved model as a preset (fetch.source: path)."
            )


def _read_tensors(path: Path) -> dict[tuple[str, str], np.ndarray]:
    """Return the matrices by module and `A` or `B`, float32.

    Raises:
        StageError: the file cannot be read, holds something else, or one matrix of a pair only.
    """
    tensors: dict[tuple[str, str], np.ndarray] = {}
    try:
        if not path.is_file():
            raise FileNotFoundError("no such file")
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (the file is no mapping)
                if (found := TENSOR.fullmatch(name)) is None:
                    raise StageError(
                        "The adapter must hold the matrices lora_A and lora_B of linear layers. "
                        f"Received: {shown(name)} in {path}"
                    )
                tensors[found["module"], found["matrix"]] = file.get_tensor(name).astype(np.float32)
    except (OSError, SafetensorError) as error:
        raise StageError(
            f"An adapter's folder must hold {WEIGHTS}, a complete safetensors file ({shown(error)}). Received: {path}"
        ) from error
    for module, matrix in tensors:
        other = "B" if matrix == "A" else "A"
        if (module, other) not in tensors:
            raise StageError(
                f"The adapter must hold lora_A and lora_B of {shown(module)}. Received: lora_{matrix} alone"
            )
    if not tensors:
        raise StageError(f"The adapter must hold the matrices of a layer. Received: none in {path}")
    return tensors


def _matches(name: str, targets: list[str] | str | None) -> bool:
    """Return whether PEFT takes a module for a target: by a regular expression, or by the end of its name."""
    if targets is None:
        return False
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in targets)


def _check_targets(config: _Config, modules: list[str], every: list[str], folder: Path) -> None:
    """Refuse an adapter whose matrices are not those of the layers that its configuration names.

    PEFT itself gives such a layer an adapter that does nothing, and a warning.
    """
    blocks = config.layers_to_transform
    blocks = [blocks] if isinstance(blocks, int) else blocks
    try:
        wanted = [
            name
            for name in every
            if _matches(name, config.target_modules)
            and not _matches(name, config.exclude_modules)
            and (not blocks or int(name.split("layers.")[1].split(".")[0]) in blocks)
        ]
    except re.error as error:
        raise StageError(
            f"target_modules must be names or a regular expression ({error}). Received: "
            f"{brief(config.target_modules)} in {folder / CONFIG}"
        ) from error
    for names, said in ((set(wanted) - set(modules), "lacks"), (set(modules) - set(wanted), "also has")):
        if names:
            raise StageError(
                f"The adapter must hold the matrices of the layers that target_modules names, and {said} "
                f"{some(names)}. Received: target_modules={brief(config.target_modules)} in {folder}"
            )


def _lora(
    name: str,
    weight: StoredWeight,
    tensors: Mapping[tuple[str, str], np.ndarray],
    config: _Config,
    preset: str,
    made_for: str,
) -> Lora:
    """Return a layer's adapter, after holding its shapes against the layer's and the configuration's rank."""
    a, b = tensors[name, "A"], tensors[name, "B"]
    rank = _of_pattern(config.rank_pattern, name, config.r)
    outputs, inputs = weight.matrix_shape
    for matrix, found, expected in (("A", a, (rank, inputs)), ("B", b, (outputs, rank))):
        if found.shape != expected:
            raise StageError(
                f"lora_{matrix} of {name} must be {expected}: of rank {rank} by {CONFIG}, on a layer of "
                f"{outputs} outputs and {inputs} inputs in {preset}. Received: {found.shape} {made_for}"
            )
        if not np.isfinite(found).all():
            raise StageError(f"Every weight must be finite. Received: a NaN or an infinity in {name} {made_for}")
    alpha = _of_pattern(config.alpha_pattern, name, config.lora_alpha)
    return Lora(name, weight, a, b, alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _of_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return what a pattern of PEFT's has for a module: the value of its first key that the end of the name matches."""
    try:
        return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)
    except re.error as error:
        raise StageError(
            f"Keys of rank_pattern and alpha_pattern must be regular expressions ({error}). Received: {shown(pattern)}"
        ) from error
