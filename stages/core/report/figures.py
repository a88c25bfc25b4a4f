"""What the report shows of a run's files: headlines, facts, charts, memory, fallbacks, as rows and texts."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from stages.core.common.paths import CURVE
from stages.core.config.schema import Params
from stages.core.records.plan import RunKey
from stages.core.report.charts import Bar, LineChart, Tick, line_chart, stacked_bars
from stages.core.report.inputs import VARIANTS, Generation, Inputs, Sharding
from stages.core.report.text import NBSP, binary, percent, quantity, signed

# A difference of no more standard errors than this is not called better or worse.
STANDARD_ERRORS = 2
KINDS = {"weight": "weights", "lora": "LoRA", "optimizer": "optimizer"}


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
        numbers = [value for value in (before, after) if is_number(value)]
        if not numbers:
            continue
        change, judgement = "", ""
        if len(numbers) == 2 and before:
            error = compared.get(f"{difference}_difference_standard_error")
            judgement = _judged(compared, difference)
            if key == "perplexity":
                change = f"{signed((after - before) / before * 100, 1)}{NBSP}%"
            elif key == "loss":
                change = signed(after - before, 3) + (f" \N{PLUS-MINUS SIGN} {error:.3f}" if is_number(error) else "")
            else:
                change = f"{signed((after - before) * 100, 1)} points"
                change += f" \N{PLUS-MINUS SIGN} {error * 100:.1f}" if is_number(error) else ""
        largest = max(*numbers, 1e-12) if len(numbers) > 1 else max(numbers[0], 1e-12)
        widths = [round(100 * max(value, 0) / largest, 2) if is_number(value) else 0.0 for value in (before, after)]
        found.append(Headline(label, unit, quantity(key, before), quantity(key, after), change, judgement, *widths))
    return found


def _judged(compared: dict[str, Any], name: str) -> str:
    """Return whether tuning changed the loss or the token accuracy: better, worse, same, or nothing if not compared."""
    difference, error = (compared.get(f"{name}_difference{suffix}") for suffix in ("", "_standard_error"))
    if not is_number(difference) or not is_number(error):
        return ""
    if abs(difference) <= STANDARD_ERRORS * error:
        return "same"
    return "better" if (difference < 0) == (name == "loss") else "worse"


def is_number(value: Any) -> bool:
    """Return whether a value read from JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def verdict(inputs: Inputs, params: Params) -> str:
    """Return the outcome in two or three sentences."""
    before, after = (inputs.metrics.get(f"evaluate-{variant}", {}).get("perplexity") for variant in VARIANTS)
    compared = inputs.metrics.get("compare", {})
    tuned = inputs.metrics.get("finetune", {})
    sharding = inputs.sharding.get("tuned") or inputs.sharding["baseline"]
    devices = math.prod(sharding.mesh.shape)
    sentences = []
    if is_number(before) and is_number(after) and before:
        relative = (after - before) / before
        verb = "stayed at" if abs(relative) < 5e-4 else "fell from" if relative < 0 else "rose from"
        how = "full-parameter tuning" if params.finetune.rank == 0 else f"LoRA tuning at rank {params.finetune.rank}"
        steps = f" and {quantity('steps', tuned['steps'])} steps" if tuned.get("steps") else ""
        move = quantity("perplexity", before)
        if verb != "stayed at":
            move += f" to {quantity('perplexity', after)} ({signed(relative * 100, 1)}{NBSP}%)"
        count = inputs.metrics["evaluate-tuned"].get("reviews")
        reviews = f"{count:,} whole held-out reviews" if is_number(count) else "whole held-out reviews"
        chance = ", within two standard errors of no change" if _judged(compared, "loss") == "same" else ""
        sentences.append(f"After {how}{steps}, perplexity on {reviews} {verb} {move}{chance}.")
    if is_number(tuned.get("total_parameters")) and is_number(tuned.get("trainable_parameters")):
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
    part = f"{percent(trainable / total)} of them" if is_number(trainable) and is_number(total) and total else ""
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
