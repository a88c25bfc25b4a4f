"""The run in one line: the few figures that DVC shows as metrics."""

from __future__ import annotations

from stages.core.config.schema import Params
from stages.core.records.summary import Summary, VariantSummary
from stages.core.report.figures import run_as_planned
from stages.core.report.inputs import VARIANTS, Inputs


def summary(inputs: Inputs, params: Params) -> Summary:
    """Return the headline figures of what the pipeline has written so far, to four digits."""
    base, tuned, run = inputs.evaluate.get("baseline"), inputs.evaluate.get("tuned"), inputs.finetune
    return Summary(
        perplexity_base=_rounded(base.perplexity if base else None),
        perplexity=_rounded(tuned.perplexity if tuned else None),
        loss_base=_rounded(base.loss if base else None),
        loss=_rounded(tuned.loss if tuned else None),
        accuracy=_rounded(tuned.token_accuracy if tuned else None),
        trainable=run.trainable_parameters if run else None,
        step_s=_rounded(run.step_seconds_median if run else None),
        tokens_per_s=_rounded(run.tokens_per_second if run else None),
        peak_gib=_rounded(run.peak_host_bytes / 2**30 if run else None),
        replicated=_rounded(inputs.load.replicated_fraction if inputs.load else None),
        plan_hbm=_rounded(_planned(inputs, params)),
        variants={
            name: VariantSummary(perplexity=_digits(found.perplexity), loss=_digits(found.loss))
            for name, found in inputs.evaluate.items()
            if name not in VARIANTS
        }
        or None,
    )


def _planned(inputs: Inputs, params: Params) -> float | None:
    """Return the largest fraction of a chip's memory that this run needs by the plan."""
    if inputs.plan is None:
        return None
    run = run_as_planned(inputs.sharding.get("tuned") or inputs.sharding["baseline"], params)
    fractions = [
        target.needed_bytes_per_device / target.hbm_bytes_per_device
        for target in inputs.plan.targets.values()
        if run.matches(target) and target.needed_bytes_per_device and target.hbm_bytes_per_device
    ]
    return max(fractions, default=None)


def _rounded(value: float | None) -> float | None:
    return None if value is None else _digits(value)


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
