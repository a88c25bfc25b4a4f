"""The report: one HTML page that shows an engineer what the pipeline did and how the model lay on the mesh.

Purpose: read every output, turn numbers into text with units, and render `template.html`. The page is one file:
its style and script are inline, allowed by their hashes, and nothing else may run or load. Text from a model or a
review only ever passes through autoescaping. The same inputs give the same bytes: no time stamps.
Reads: the preset's manifest and `data/sharding/base.json`; where they exist `data/sharding/tuned.json` and `plan.json`,
`data/metrics/`, `data/plots/` and `data/generated/`. Writes nothing itself.
Command: python -m stages.report
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import json
import math
import platform
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, Field, ValidationError

from stages.core.common.errors import StageError
from stages.core.common.paths import CURVE, MANIFEST, PLAN, SAMPLES, SHARDING, Paths, generated, maker_of, metrics
from stages.core.config.schema import Params
from stages.core.records.plan import PlanFile, RunKey
from stages.core.report.charts import Bar, LineChart, Tick, line_chart, mesh_picture, stacked_bars
from stages.core.report.plan_section import plan_view
from stages.core.report.text import NBSP, binary, percent, quantity, signed

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
# A difference of no more standard errors than this is not called better or worse.
STANDARD_ERRORS = 2
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
KINDS = {"weight": "weights", "lora": "LoRA", "optimizer": "optimizer"}
PACKAGES = ("keras", "keras-hub", "jax", "jaxlib")
# C0 controls other than tab and newline have no meaning in HTML; Unicode has a visible picture for each (U+2400 on).
PICTURES = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)} | {0x7F: 0x2421}

Form = TypeVar("Form", bound=BaseModel)


class Licence(BaseModel):
    """A licence by name and address."""

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


@dataclass(frozen=True)
class Headline:
    """A result before and after; `judgement` is better, worse, same (within chance), or empty if none is possible."""

    label: str
    unit: str
    before: str
    after: str
    change: str
    judgement: str
    before_width: float
    after_width: float


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


def partition_spec(spec: list[str | list[str] | None]) -> str:
    """Return a spec as it is written in code: `PartitionSpec(None, 'model', ('batch', 'model'))`."""
    entries = [repr(tuple(entry)) if isinstance(entry, list) else repr(entry) for entry in spec]
    return f"PartitionSpec({', '.join(entries)})"


def dimensions(shape: list[int]) -> str:
    """Return a shape as `262,144 x 640` with the true sign: `(262,144, 640)` would seem to have three axes."""
    return " \N{MULTIPLICATION SIGN} ".join(f"{size:,}" for size in shape) or "scalar"


def headlines(evaluated: dict[str, dict[str, Any]], compared: dict[str, Any]) -> list[Headline]:
    """Return perplexity, loss and token accuracy on the whole held-out reviews, before and after, with the change.

    Args:
        evaluated: the metrics of `evaluate` by variant; one of the two may be missing.
        compared: the metrics of `compare`; empty if they are missing.
    """
    found = []
    for key, label, unit, difference in (
        ("perplexity", "Perplexity", "", "loss"),
        ("loss", "Loss", "nats per token", "loss"),
        ("token_accuracy", "Next token right", "of tokens", "token_accuracy"),
    ):
        before, after = (evaluated.get(variant, {}).get(key) for variant in VARIANTS)
        numbers = [value for value in (before, after) if _is_number(value)]
        if not numbers:
            continue
        change, judgement = "", ""
        if len(numbers) == 2 and before:
            error = compared.get(f"{difference}_difference_standard_error")
            judgement = _judged(compared, difference)
            if key == "perplexity":
                change = f"{signed((after - before) / before * 100, 1)}{NBSP}%"
            elif key == "loss":
                change = signed(after - before, 3) + (f" \N{PLUS-MINUS SIGN} {error:.3f}" if _is_number(error) else "")
            else:
                change = f"{signed((after - before) * 100, 1)} points"
                change += f" \N{PLUS-MINUS SIGN} {error * 100:.1f}" if _is_number(error) else ""
        largest = max(*numbers, 1e-12) if len(numbers) > 1 else max(numbers[0], 1e-12)
        widths = [round(100 * max(value, 0) / largest, 2) if _is_number(value) else 0.0 for value in (before, after)]
        found.append(Headline(label, unit, quantity(key, before), quantity(key, after), change, judgement, *widths))
    return found


def _judged(compared: dict[str, Any], name: str) -> str:
    """Return whether tuning changed the loss or the token accuracy: better, worse, same, or nothing if not compared."""
    difference, error = (compared.get(f"{name}_difference{suffix}") for suffix in ("", "_standard_error"))
    if not _is_number(difference) or not _is_number(error):
        return ""
    if abs(difference) <= STANDARD_ERRORS * error:
        return "same"
    return "better" if (difference < 0) == (name == "loss") else "worse"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def verdict(inputs: Inputs, params: Params) -> str:
    """Return the outcome in two or three sentences."""
    before, after = (inputs.metrics.get(f"evaluate-{variant}", {}).get("perplexity") for variant in VARIANTS)
    compared = inputs.metrics.get("compare", {})
    tuned = inputs.metrics.get("finetune", {})
    sharding = inputs.sharding.get("tuned") or inputs.sharding["baseline"]
    devices = math.prod(sharding.mesh.shape)
    sentences = []
    if _is_number(before) and _is_number(after) and before:
        relative = (after - before) / before
        verb = "stayed at" if abs(relative) < 5e-4 else "fell from" if relative < 0 else "rose from"
        how = "full-parameter tuning" if params.finetune.rank == 0 else f"LoRA tuning at rank {params.finetune.rank}"
        steps = f" and {quantity('steps', tuned['steps'])} steps" if tuned.get("steps") else ""
        move = quantity("perplexity", before)
        if verb != "stayed at":
            move += f" to {quantity('perplexity', after)} ({signed(relative * 100, 1)}{NBSP}%)"
        count = inputs.metrics["evaluate-tuned"].get("reviews")
        reviews = f"{count:,} whole held-out reviews" if _is_number(count) else "whole held-out reviews"
        chance = ", within two standard errors of no change" if _judged(compared, "loss") == "same" else ""
        sentences.append(f"After {how}{steps}, perplexity on {reviews} {verb} {move}{chance}.")
    if _is_number(tuned.get("total_parameters")) and _is_number(tuned.get("trainable_parameters")):
        part = tuned["trainable_parameters"] / tuned["total_parameters"]
        sentences.append(f"{percent(part)} of {tuned['total_parameters']:,} parameters were trained.")
    what = {
        "baseline": "weights",
        "tuned": "weights, adapter and optimizer state"
        if "lora" in sharding.by_kind
        else "weights and optimizer state",
    }["tuned" if "tuned" in inputs.sharding else "baseline"]
    each = f"Each of {devices:,} devices" if devices > 1 else "The one device"
    sentences.append(f"{each} held {binary(sharding.bytes_per_device)} of {what}.")
    return " ".join(sentences)


def facts(inputs: Inputs) -> list[tuple[str, str, str]]:
    """Return the run's main numbers as (label, value, remark)."""
    tuned, load = inputs.metrics.get("finetune", {}), inputs.metrics.get("load", {})
    found = []

    def add(label: str, source: dict[str, Any], key: str, remark: str = "") -> None:
        if key in source:
            found.append((label, quantity(key, source[key]), remark))

    trainable, total = tuned.get("trainable_parameters"), tuned.get("total_parameters")
    add("Parameters", tuned, "total_parameters")
    part = f"{percent(trainable / total)} of them" if _is_number(trainable) and _is_number(total) and total else ""
    add("Trained parameters", tuned, "trainable_parameters", part)
    add("Steps", tuned, "steps")
    if "loss_first" in tuned and "loss_last" in tuned:
        move = f"{quantity('loss', tuned['loss_first'])} → {quantity('loss', tuned['loss_last'])}"
        found.append(("Training loss, first → last", move, "nats per token"))
    add("Trained tokens per second", tuned, "tokens_per_second")
    add("Positions per second", tuned, "positions_per_second", "prompts and padding included")
    add("Step, median", tuned, "step_seconds_median")
    add("Compilation", tuned, "compile_seconds")
    add("Peak host memory, tuning", tuned, "peak_host_bytes")
    add("Peak host memory, loading", load, "peak_host_bytes")
    add("Loading", load, "seconds")
    for variant in VARIANTS:
        add(f"Generation, {variant}", inputs.metrics.get(f"generate-{variant}", {}), "tokens_per_second")
    return found


def curve_charts(curve: dict[str, list[float]]) -> tuple[list[LineChart], list[str]]:
    """Return the charts of the training curve, the loss first, and remarks on what is not drawn.

    Args:
        curve: the columns of `finetune.csv`.
    """
    steps = curve["step"]
    if not steps:
        return [], [f"{CURVE} has no rows."]
    notes = []
    broken = sum(not math.isfinite(loss) for loss in curve["loss"])
    if broken:
        notes.append(f"{broken:,} of {len(steps):,} steps have a loss that is not a number; the line is broken there.")
    epochs = [math.floor(epoch) if math.isfinite(epoch) else 0 for epoch in curve.get("epoch", [])]
    # A fraction of epochs done reaches a whole number at the very last step: no epoch begins there.
    breaks = [steps[i] for i in range(1, len(epochs) - 1) if epochs[i] > epochs[i - 1]]
    if breaks:
        notes.append("Dashed uprights: a new epoch.")
    validation = list(zip(steps, curve.get("validation_loss", []), strict=False))
    if any(math.isfinite(loss) for _, loss in validation):
        notes.append(
            "Validation sequences are the held-out reviews cut and packed as the training ones are; the results above "
            "are of whole reviews."
        )
    charts = [line_chart("Loss", "nats per token", steps, curve["loss"], validation, breaks)]
    for column, title, unit, factor in (
        ("accuracy", "Next token right", "% of tokens", 100.0),
        ("tokens_per_second", "Trained tokens per second", "tokens/s", 1.0),
        ("positions_per_second", "Positions per second", "positions/s", 1.0),
        ("learning_rate", "Learning rate", "", 1.0),
    ):
        values = [value * factor for value in curve.get(column, [])]
        if len(values) > 1 and len(set(values)) == 1:
            notes.append(f"{title}: {values[0]:.6g} {unit}".rstrip() + " at every step.")
        elif values:
            noisy = column != "learning_rate"
            charts.append(line_chart(title, unit, steps, values, breaks=breaks, from_zero=True, noisy=noisy))
    return [chart for chart in charts if chart is not None], notes


def pairs(generations: dict[str, list[Generation]]) -> list[dict[str, Any]]:
    """Return each prompt with its continuation by variant (None where a variant has none), in the files' order."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for variant in VARIANTS:
        seen: dict[str, int] = defaultdict(int)
        for generation in generations.get(variant, []):
            # A prompt may be given twice: the second one here belongs with the second one there.
            place = (generation.prompt, seen[generation.prompt])
            seen[generation.prompt] += 1
            row = rows.setdefault(place, {"prompt": generation.prompt, "baseline": None, "tuned": None})
            row[variant] = generation.text
    return list(rows.values())


def memory(sharding: dict[str, Sharding]) -> dict[str, Any]:
    """Return what a device holds, by kind and variant: bars with their axis, and the rows of a table."""
    parts: dict[str, dict[str, tuple[int, int]]] = {}
    for variant, one in sharding.items():
        replicated: dict[str, int] = defaultdict(int)
        for weight in one.weights:
            replicated[weight.kind] += weight.bytes_per_device * weight.replicated
        ordered = [
            *(kind for kind in KINDS if kind in one.by_kind),
            *(kind for kind in one.by_kind if kind not in KINDS),
        ]
        parts[variant] = {kind: (one.by_kind[kind], min(replicated[kind], one.by_kind[kind])) for kind in ordered}
    power = 3 if max((one.bytes_per_device for one in sharding.values()), default=0) >= 2**30 else 2
    bars: tuple[list[Bar], list[Tick]] = stacked_bars(
        [
            (
                variant,
                [
                    piece
                    for kind, (total, held) in kinds.items()
                    for piece in ((kind, False, total - held), (kind, True, held))
                ],
            )
            for variant, kinds in parts.items()
        ],
        1024**power,
    )
    kinds = list(dict.fromkeys(kind for one in parts.values() for kind in one))
    return {
        "bars": bars[0],
        "ticks": bars[1],
        "unit": ("MiB", "GiB")[power - 2],
        "kinds": {kind: KINDS.get(kind, kind) for kind in kinds},
        "rows": [(kind, KINDS.get(kind, kind), [parts[variant].get(kind) for variant in parts]) for kind in kinds],
        "widened": any(segment.widened for bar in bars[0] for segment in bar.segments),
        "hatched": any(held for one in parts.values() for _, held in one.values()),
    }


def fallbacks(sharding: dict[str, Sharding]) -> list[dict[str, str]]:
    """Return the fallbacks of all variants, each once, as text."""
    found = {}
    for one in sharding.values():
        for fallback in one.fallbacks:
            row = {
                "pattern": fallback.pattern,
                "wanted": _spec_text(fallback.wanted),
                "used": _spec_text(fallback.used),
                "reason": fallback.reason,
            }
            found[tuple(row.values())] = row
    return list(found.values())


def run_as_planned(sharding: Sharding, params: Params) -> RunKey:
    """Return how the model was trained, as the plan names a step."""
    tuning = params.finetune
    return RunKey(
        preset=sharding.preset,
        mesh=sharding.mesh.shape,
        layout=sharding.layout,
        dtype=sharding.dtype,
        batch_size=tuning.batch_size,
        length=params.tokenize.length,
        rank=tuning.rank,
        lora_targets=tuning.targets if tuning.rank else None,
        rematerialize=tuning.rematerialize,
        step="ours",
    )


def _spec_text(spec: Any) -> str:
    return partition_spec(spec) if isinstance(spec, list) else str(spec)


def settings(params: Params) -> dict[str, list[tuple[str, str]]]:
    """Return the settings by section as (key, text), values written as YAML would take them."""

    def text(value: Any) -> str:
        if isinstance(value, list) and value and all(isinstance(entry, str) and " " in entry for entry in value):
            return "\n".join(json.dumps(entry, ensure_ascii=False) for entry in value)
        if isinstance(value, list) and not any(isinstance(entry, dict | list) for entry in value):
            return f"[{', '.join(text(entry) for entry in value)}]"
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return {
        section: [(key, text(value)) for key, value in values.items()]
        for section, values in params.model_dump().items()
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that do the work, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def clean(value: Any) -> Any:
    """Return a text that HTML can hold as it stands: what a browser would drop or refuse gets a visible stand-in.

    Control characters become their Unicode pictures and lone surrogates (half of a pair, as broken JSON can hold)
    U+FFFD. Anything but plain text is given back as it is.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    whole = value.replace("\r\n", "\n").translate(PICTURES)
    return "".join("\N{REPLACEMENT CHARACTER}" if "\ud800" <= char <= "\udfff" else char for char in whole)


def web_address(text: str) -> str | None:
    """Return the text if it is a web address to link to, else None: `javascript:` is an address too."""
    return text if text.startswith(("https://", "http://")) else None


def source_hash(text: str) -> str:
    """Return the Content-Security-Policy source that allows exactly this inline text (W3C CSP level 3, 2.3.1)."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def render(inputs: Inputs, params: Params) -> str:
    """Return the page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=clean,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "binary": binary,
        "percent": percent,
        "spec": partition_spec,
        "dimensions": dimensions,
        "web_address": web_address,
    }
    template = environment.get_template("template.html")
    # The style and the script are blocks of the template, so that what is hashed is what stands in the page.
    hashes = {name: source_hash("".join(template.blocks[name](template.new_context()))) for name in ("style", "script")}
    sharding = inputs.sharding.get("tuned") or inputs.sharding["baseline"]
    tuned = inputs.metrics.get("finetune", {})
    charts, curve_notes = curve_charts(inputs.curve) if inputs.curve is not None else ([], [])
    evaluated = {
        variant: inputs.metrics[f"evaluate-{variant}"]
        for variant in VARIANTS
        if f"evaluate-{variant}" in inputs.metrics
    }
    return template.render(
        hashes=hashes,
        inputs=inputs,
        manifest=inputs.manifest,
        missing=inputs.missing,
        sharding=sharding,
        weights_of="tuned" if "tuned" in inputs.sharding else "baseline",
        devices=math.prod(sharding.mesh.shape),
        params=params,
        verdict=verdict(inputs, params),
        headlines=headlines(evaluated, inputs.metrics.get("compare", {})),
        targets=[
            (variant, values["targets"]) for variant, values in evaluated.items() if _is_number(values.get("targets"))
        ],
        reviews_cut=max((values.get("reviews_cut") or 0 for values in evaluated.values()), default=0),
        facts=facts(inputs),
        charts=charts,
        curve_notes=curve_notes,
        pairs=pairs(inputs.generations),
        mesh=mesh_picture(sharding.mesh.shape, sharding.mesh.axis_names),
        largest=max((w for w in sharding.weights if not w.replicated), key=lambda w: w.bytes // w.count, default=None),
        memory=memory(inputs.sharding),
        fallbacks=fallbacks(inputs.sharding),
        plan=inputs.plan and plan_view(inputs.plan, run_as_planned(sharding, params), sharding.mesh.devices, tuned),
        numbers={
            name: [(key, quantity(key, value)) for key, value in values.items()]
            for name, values in inputs.metrics.items()
        },
        metrics_files=[metrics(name) for name in METRICS],
        settings=settings(params),
        versions=versions(),
        paths={"curve": CURVE, "samples": SAMPLES, "plan": PLAN, "tuned_sharding": SHARDING["tuned"]}
        | {f"generated_{variant}": generated(variant) for variant in VARIANTS}
        | {f"evaluate_{variant}": metrics(f"evaluate-{variant}") for variant in VARIANTS}
        | {"finetune": metrics("finetune"), "compare": metrics("compare")},
    )
