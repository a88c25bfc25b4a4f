"""The files that the report is made from: their schemas, and reading them; what is missing is listed, not an error."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from stages.core.common.errors import StageError
from stages.core.common.paths import CURVE, MANIFEST, PLAN, SAMPLES, SHARDING, Paths, generated, maker_of, metrics
from stages.core.records.plan import PlanFile

VARIANTS = ("baseline", "tuned")
METRICS = (
    "prepare",
    "tokenize",
    "load",
    "finetune",
    "generate-baseline",
    "generate-tuned",
    "evaluate-baseline",
    "evaluate-tuned",
    "compare",
)
CURVE_COLUMNS = (
    "step",
    "loss",
    "epoch",
    "accuracy",
    "tokens_per_second",
    "positions_per_second",
    "learning_rate",
    "validation_loss",
)
Form = TypeVar("Form", bound=BaseModel)


class Licence(BaseModel):
    """A license by name and address."""

    name: str
    url: str


class PresetFile(BaseModel):
    """A file of the preset: size in bytes and hexadecimal SHA-256."""

    name: str
    size: int
    sha256: str


class Manifest(BaseModel):
    """What `fetch` wrote about the preset; the folder is left out, it means nothing on another machine."""

    preset: str
    source: str
    format: str
    handle: str | None = None
    licence: Licence
    files: list[PresetFile]


class MeshFacts(BaseModel):
    """The device mesh: the length and the name of each axis, and the platform of its devices."""

    shape: list[int] = Field(min_length=1, max_length=2)
    axis_names: list[str] = Field(min_length=1, max_length=2)
    devices: str


class Weight(BaseModel):
    """Weights of one shape that one rule laid out; `bytes` is all of them once, `bytes_per_device` what one holds."""

    pattern: str
    count: int
    shape: list[int]
    dtype: str
    kind: str
    rule: str | None
    spec: list[str | list[str] | None]
    shard_shape: list[int]
    bytes: int
    bytes_per_device: int
    replicated: bool


class Fallback(BaseModel):
    """A weight that could not be split as its rule wanted."""

    pattern: str
    wanted: Any
    used: Any
    reason: str


class Sharding(BaseModel):
    """How a variant lay on the mesh, sizes in bytes.

    `bytes` and `replicated_fraction` are of the model, which is weights and LoRA; what a device holds, by kind and in
    all, counts the optimizer's state too.
    """

    preset: str
    mesh: MeshFacts
    layout: str
    dtype: str
    parameters: int
    trainable_parameters: int
    bytes: int
    bytes_per_device: int
    replicated_bytes: int
    replicated_fraction: float
    by_kind: dict[str, int]
    weights: list[Weight]
    fallbacks: list[Fallback] = []

    @property
    def times_a_device(self) -> float | None:
        """How many times the model is what a device holds of it, or None where a device holds nothing."""
        held = self.bytes_per_device - self.by_kind.get("optimizer", 0)
        return self.bytes / held if held > 0 else None


class Generation(BaseModel):
    """A prompt and its continuation."""

    prompt: str
    text: str


class Sample(Generation):
    """What the prompt was continued with after a step of the training."""

    step: int


@dataclass
class Inputs:
    """Everything the report shows; `missing` has for each absent file the command that writes it."""

    manifest: Manifest
    sharding: dict[str, Sharding]
    metrics: dict[str, dict[str, Any]]
    curve: dict[str, list[float]] | None
    generations: dict[str, list[Generation]]
    samples: list[Sample] = field(default_factory=list)
    plan: PlanFile | None = None
    missing: dict[str, str] = field(default_factory=dict)


def read_inputs(paths: Paths) -> Inputs:
    """Read every output of the pipeline.

    Raises:
        StageError: the manifest or the baseline's sharding is not there, or a file does not have its form.
    """
    manifest = _read_form(paths.read(MANIFEST), MANIFEST, Manifest)
    sharding = {"baseline": _read_form(paths.read(SHARDING["baseline"]), SHARDING["baseline"], Sharding)}
    inputs = Inputs(manifest, sharding, {}, None, {})

    def optional(relative: str) -> Path | None:
        try:
            return paths.read(relative)
        except StageError:
            name = Path(relative).stem
            # paths.maker_of knows the variants of generate and evaluate; other metrics bear their stage's name.
            inputs.missing[relative] = (
                f"python -m stages.{name}" if name in METRICS and "-" not in name else maker_of(relative)
            )
            return None

    if path := optional(SHARDING["tuned"]):
        sharding["tuned"] = _read_form(path, SHARDING["tuned"], Sharding)
    for name in METRICS:
        if path := optional(metrics(name)):
            inputs.metrics[name] = _read_metrics(path, metrics(name))
    if path := optional(CURVE):
        inputs.curve = _read_curve(path)
    for variant in VARIANTS:
        if path := optional(generated(variant)):
            inputs.generations[variant] = _read_lines(path, generated(variant), Generation)
    if path := optional(SAMPLES):
        inputs.samples = _read_lines(path, SAMPLES, Sample)
    if path := optional(PLAN):
        inputs.plan = _read_form(path, PLAN, PlanFile)
    return inputs


def _broken(relative: str, problem: str) -> StageError:
    return StageError(f"{relative} does not have its form: {problem}. Run `dvc repro` to write it again.")


def _read_form(path: Path, relative: str, form: type[Form]) -> Form:
    try:
        return form.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        received = str(first["input"])[:80]
        raise _broken(relative, f"{place}: {first['msg']}. Received: {received!r}") from error


def _read_metrics(path: Path, relative: str) -> dict[str, Any]:
    """Return a metrics file with nested keys joined by points."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _broken(relative, f"it must be JSON, {error}") from error
    if not isinstance(content, dict):
        raise _broken(relative, f"it must hold an object. Received: {type(content).__name__}")
    flat: dict[str, Any] = {}

    def flatten(prefix: str, node: dict[str, Any]) -> None:
        for key, value in node.items():
            if isinstance(value, dict):
                flatten(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = value

    flatten("", content)
    return flat


def _read_text(path: Path, relative: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _broken(relative, f"it must be UTF-8 text, {error}") from error


def _read_curve(path: Path) -> dict[str, list[float]]:
    """Return the columns of the training curve; a blank cell is not a number."""
    reader = csv.DictReader(_read_text(path, CURVE).splitlines())
    names = list(reader.fieldnames or [])
    if not {"step", "loss"} <= set(names):
        raise _broken(CURVE, f"it must have the columns step and loss. Received: {names}")
    columns: dict[str, list[float]] = {name: [] for name in CURVE_COLUMNS if name in names}
    for row in reader:
        for name, values in columns.items():
            try:
                values.append(float(row[name]) if row[name] else math.nan)
            except ValueError as error:
                raise _broken(CURVE, f"line {reader.line_num}: {name} must be a number, {error}") from error
        if not math.isfinite(columns["step"][-1]):
            raise _broken(CURVE, f"line {reader.line_num}: step must be a number. Received: {row['step']!r}")
    return columns


def _read_lines(path: Path, relative: str, form: type[Form]) -> list[Form]:
    found = []
    # Only a newline ends a line of JSONL: splitlines() would also cut at the U+2028 that a model may write.
    for number, line in enumerate(_read_text(path, relative).split("\n"), 1):
        if line.strip():
            try:
                found.append(form.model_validate_json(line))
            except ValidationError as error:
                keys = " and ".join(form.model_fields)
                raise _broken(relative, f"line {number} must be an object with {keys}") from error
    return found
