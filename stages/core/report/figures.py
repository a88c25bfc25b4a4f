"""What the report shows of a run's files: headlines, facts, charts, memory, fallbacks, as rows and texts."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from stages.core.common.paths import CURVE
from stages.core.config.schema import Params
from stages.core.records.evaluate import Difference, EvaluateMetrics
from stages.core.records.finetune import Step
from stages.core.records.generate import Generation
from stages.core.records.plan import RunKey
from stages.core.records.record import FileRecord
from stages.core.records.sharding import Sharding
from stages.core.report.axes import Tick
from stages.core.report.bars import Bar, stacked_bars
from stages.core.report.inputs import VARIANTS, Inputs
from stages.core.report.line_charts import LineChart, line_chart
from stages.core.report.text import NBSP, binary, percent, quantity, signed
from stages.core.report.variants_table import harness_scores

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


def headlines(evaluated: dict[str, EvaluateMetrics], compared: Difference | None) -> list[Headline]:
    """Return perplexity, loss and token accuracy on the whole held-out reviews, before and after, with the change.

    Args:
        evaluated: the metrics of `evaluate` by variant; one of the two may be missing.
        compared: the metrics of `compare`; None if they are missing.
    """
    found = []
    for key, label, unit, difference in (
        ("perplexity", "Perplexity", "", "loss"),
        ("loss", "Loss", "nats per token", "loss"),
        ("token_accuracy", "Next token right", "of tokens", "token_accuracy"),
    ):
        before, after = (getattr(evaluated[each], key) if each in evaluated else None for each in VARIANTS)
        numbers = [value for value in (before, after) if value is not None]
        if not numbers:
            continue
        change, judgement = "", ""
        if before and after is not None:
            _, error = _difference(compared, difference)
            judgement = _judged(compared, difference)
            if key == "perplexity":
                change = f"{signed((after - before) / before * 100, 1)}{NBSP}%"
            elif key == "loss":
                change = signed(after - before, 3) + ("" if error is None else f" \N{PLUS-MINUS SIGN} {error:.3f}")
            else:
                change = f"{signed((after - before) * 100, 1)} points"
                change += "" if error is None else f" \N{PLUS-MINUS SIGN} {error * 100:.1f}"
        largest = max([*numbers, 1e-12])
        widths = [0.0 if value is None else round(100 * max(value, 0) / largest, 2) for value in (before, after)]
        found.append(Headline(label, unit, quantity(key, before), quantity(key, after), change, judgement, *widths))
    return found


def _difference(compared: Difference | None, name: str) -> tuple[float | None, float | None]:
    """Return by how much tuning changed the loss or the token accuracy, and the standard error of that."""
    if compared is None:
        return None, None
    return getattr(compared, f"{name}_difference"), getattr(compared, f"{name}_difference_standard_error")


def _judged(compared: Difference | None, name: str) -> str:
    """Return whether tuning changed the loss or the token accuracy: better, worse, same, or nothing if not compared."""
    difference, error = _difference(compared, name)
    if difference is None or error is None:
        return ""
    if abs(difference) <= STANDARD_ERRORS * error:
        return "same"
    return "better" if (difference < 0) == (name == "loss") else "worse"


def verdict(inputs: Inputs, params: Params) -> str:
    """Return the outcome in two or three sentences."""
    tuned = inputs.finetune
    sharding = inputs.sharding.get("tuned") or inputs.sharding["baseline"]
    devices = math.prod(sharding.mesh.shape)
    sentences = []
    if inputs.evaluate.keys() >= set(VARIANTS):
        before, after = (inputs.evaluate[variant].perplexity for variant in VARIANTS)
        relative = (after - before) / before
        verb = "stayed at" if abs(relative) < 5e-4 else "fell from" if relative < 0 else "rose from"
        how = "full-parameter tuning" if params.finetune.rank == 0 else f"LoRA tuning at rank {params.finetune.rank}"
        steps = f" and {quantity('steps', tuned.steps)} steps" if tuned else ""
        move = quantity("perplexity", before)
        if verb != "stayed at":
            move += f" to {quantity('perplexity', after)} ({signed(relative * 100, 1)}{NBSP}%)"
        reviews = f"{inputs.evaluate['tuned'].reviews:,} whole held-out reviews"
        chance = ", within two standard errors of no change" if _judged(inputs.compare, "loss") == "same" else ""
        sentences.append(f"After {how}{steps}, perplexity on {reviews} {verb} {move}{chance}.")
    if tuned:
        part = tuned.trainable_parameters / tuned.total_parameters
        sentences.append(f"{percent(part)} of {tuned.total_parameters:,} parameters were trained.")
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
    tuned, load = inputs.finetune, inputs.load
    found = []

    def add(label: str, source: FileRecord | None, key: str, remark: str = "") -> None:
        if source:
            found.append((label, quantity(key, getattr(source, key)), remark))

    add("Parameters", tuned, "total_parameters")
    part = f"{percent(tuned.trainable_parameters / tuned.total_parameters)} of them" if tuned else ""
    add("Trained parameters", tuned, "trainable_parameters", part)
    add("Steps", tuned, "steps")
    if tuned:
        move = f"{quantity('loss', tuned.loss_first)} → {quantity('loss', tuned.loss_last)}"
        found.append(("Training loss, first → last", move, "nats per token"))
    add("Trained tokens per second", tuned, "tokens_per_second")
    add("Positions per second", tuned, "positions_per_second", "prompts and padding included")
    add("Step, median", tuned, "step_seconds_median")
    add("Compilation", tuned, "compile_seconds")
    add("Peak host memory, tuning", tuned, "peak_host_bytes")
    add("Peak host memory, loading", load, "peak_host_bytes")
    add("Loading", load, "seconds")
    for variant in VARIANTS:
        add(f"Generation, {variant}", inputs.generate.get(variant), "tokens_per_second")
    for key, label in (("distinct_2_fraction", "Distinct pairs of tokens"), ("repeated_4_fraction", "Repeated fours")):
        for variant in VARIANTS:
            if (measured := inputs.generate.get(variant)) and getattr(measured, key) is not None:
                add(f"{label}, {variant}", measured, key, "of the generated texts")
    for variant in VARIANTS:
        if (result := inputs.evaluate.get(variant)) and (task := result.sentiment):
            interval = f"95{NBSP}% interval {percent(task.accuracy_low)} to {percent(task.accuracy_high)}"
            found.append((f"Sentiment, {variant}", percent(task.accuracy), f"{interval}, {task.reviews:,} reviews"))
    for variant in VARIANTS:
        scores = harness_scores(inputs.evaluate.get(variant))
        found += [(f"{label}, {variant}", score, "lm-evaluation-harness") for label, score in scores.items()]
    if (base := inputs.evaluate.get("baseline")) and (before := base.float_base):
        error = before.loss_difference_standard_error
        change = f"{signed(before.loss_difference, 4)}" + ("" if error is None else f" \N{PLUS-MINUS SIGN} {error:.4f}")
        found.append(("Baseline's loss, quantizing", change, f"from {before.loss:.4f} nats per token in floats"))
    return found


def curve_charts(curve: list[Step]) -> tuple[list[LineChart], list[str]]:
    """Return the charts of the training curve, the loss first, and remarks on what is not drawn."""
    steps, losses = [float(row.step) for row in curve], [row.loss for row in curve]
    if not steps:
        return [], [f"{CURVE} has no rows."]
    notes = []
    broken = sum(not math.isfinite(loss) for loss in losses)
    if broken:
        notes.append(f"{broken:,} of {len(steps):,} steps have a loss that is not a number; the line is broken there.")
    breaks = [float(row.step) for before, row in itertools.pairwise(curve) if row.epoch > before.epoch]
    if breaks:
        notes.append("Dashed uprights: a new epoch.")
    validation = [(float(row.step), row.validation_loss) for row in curve if row.validation_loss is not None]
    if validation:
        notes.append(
            "Validation sequences are held-out reviews cut and packed as the training ones are, the first ones if "
            "finetune.validate_sequences is set; the results above are of all held-out reviews, whole."
        )
    charts = [line_chart("Loss", "nats per token", steps, losses, validation, breaks)]
    for column, title, unit, factor in (
        ("accuracy", "Next token right", "% of tokens", 100.0),
        ("tokens_per_second", "Trained tokens per second", "tokens/s", 1.0),
        ("positions_per_second", "Positions per second", "positions/s", 1.0),
        ("learning_rate", "Learning rate", "", 1.0),
    ):
        values = [getattr(row, column) * factor for row in curve]
        if len(values) > 1 and len(set(values)) == 1:
            notes.append(f"{title}: {values[0]:.6g} {unit}".rstrip() + " at every step.")
        else:
            noisy = column != "learning_rate"
            charts.append(line_chart(title, unit, steps, values, breaks=breaks, from_zero=True, noisy=noisy))
    return [chart for chart in charts if chart is not None], notes


def pairs(generations: dict[str, list[Generation]]) -> list[dict[str, Any]]:
    """Return each prompt with its continuations by variant (None where a variant has none), in the files' order."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for variant, written in generations.items():
        seen: dict[str, int] = defaultdict(int)
        for generation in written:
            # A prompt may be given twice: the second one here belongs with the second one there.
            place = (generation.prompt, seen[generation.prompt])
            seen[generation.prompt] += 1
            texts = dict.fromkeys(generations)
            row = rows.setdefault(place, {"prompt": generation.prompt, "sample": generation.sample, "texts": texts})
            row["texts"][variant] = generation.text
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
                "wanted": fallback.wanted,
                "used": fallback.used,
                "reason": fallback.reason,
            }
            found[tuple(row.values())] = row
    return list(found.values())


def run_as_planned(sharding: Sharding, params: Params) -> RunKey:
    """Return how the model was trained, as the plan names a step."""
    return RunKey(
        preset=sharding.preset,
        mesh=list(sharding.mesh.shape),
        layout=sharding.layout,
        shard_over_batch=sharding.shard_over_batch,
        rules=[(rule.pattern, rule.spec) for rule in params.layout.rules or ()] or None,
        dtype=sharding.dtype,
        length=params.tokenize.length,
        step="ours",
        **params.finetune.step_key,
    )
