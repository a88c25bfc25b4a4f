"""The variants side by side, a column for each, where the settings name more than the pipeline's own."""

from __future__ import annotations

from stages.core.records.evaluate import EvaluateMetrics
from stages.core.report.inputs import VARIANTS, Inputs
from stages.core.report.text import NBSP, NONE, percent, quantity, signed

PLUS_MINUS = f"{NBSP}\N{PLUS-MINUS SIGN}{NBSP}"
Rows = list[tuple[str, list[str]]]


def variants_table(inputs: Inputs) -> Rows:
    """Return the rows of the table, a text for each of `inputs.variants`; none where there are only two."""
    if inputs.variants == VARIANTS:
        return []
    evaluated = [inputs.evaluate.get(name) for name in inputs.variants]
    rows: Rows = [
        (label, [quantity(key, getattr(each, key) if each else None) for each in evaluated])
        for key, label in (("perplexity", "Perplexity"), ("loss", "Loss, nats per token"))
    ]
    rows.append(("Loss, minus baseline", [_change(inputs, name) for name in inputs.variants]))
    rows.append(("Next token right", [percent(each.token_accuracy) if each else NONE for each in evaluated]))
    rows.append(("Sentiment right", [_sentiment(each) for each in evaluated]))
    generated = [inputs.generate.get(name) for name in inputs.variants]
    for key, label in (("distinct_2_fraction", "Distinct pairs of tokens"), ("repeated_4_fraction", "Repeated fours")):
        rows.append((label, [quantity(key, getattr(each, key) if each else None) for each in generated]))
    rows += _harness(evaluated)
    return [(label, values) for label, values in rows if set(values) != {NONE}]


def harness_scores(result: EvaluateMetrics | None) -> dict[str, str]:
    """Return the scores of the lm-evaluation-harness by task and metric, with their standard errors."""
    found = {}
    for task, values in ((result.lm_eval or {}) if result else {}).items():
        for metric, value in values.items():
            name, _, kind = metric.partition(" ")
            if name.endswith("_stderr"):
                continue
            error = values.get(f"{name}_stderr {kind}".strip())
            found[f"{task}, {metric}"] = f"{value:.4g}" + ("" if error is None else f"{PLUS_MINUS}{error:.2g}")
    return found


def _harness(evaluated: list[EvaluateMetrics | None]) -> Rows:
    """Return a row for each score of the lm-evaluation-harness."""
    scores = [harness_scores(each) for each in evaluated]
    labels = dict.fromkeys(label for each in scores for label in each)
    return [(label, [each.get(label, NONE) for each in scores]) for label in labels]


def _change(inputs: Inputs, name: str) -> str:
    """Return a variant's loss minus the baseline's, with the paired standard error."""
    compared = inputs.compare
    others = (compared.variants or {}) if compared else {}
    found = compared if name == "tuned" else others.get(name)
    if found is None:
        return NONE
    error = found.loss_difference_standard_error
    return signed(found.loss_difference, 3) + ("" if error is None else f"{PLUS_MINUS}{error:.3f}")


def _sentiment(result: EvaluateMetrics | None) -> str:
    """Return the accuracy of the task sentiment with its interval."""
    task = result.sentiment if result else None
    if task is None:
        return NONE
    return f"{percent(task.accuracy)} ({percent(task.accuracy_low)} to {percent(task.accuracy_high)})"
