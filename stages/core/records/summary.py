"""What `data/run.json` holds: the run in one line, which is all that DVC shows as metrics."""

from __future__ import annotations

from stages.core.records.record import FileRecord, OrAbsent, Record


class VariantSummary(Record):
    """The figures of an adapter that the setting `variants` names."""

    perplexity: float
    loss: float


class Summary(FileRecord):
    """The run's headline figures; one that is not known is left out.

    The names are short, so that `dvc metrics show` fits 160 columns. Perplexity, loss (nats per token) and accuracy
    (fraction of tokens that were the likeliest) are of the tuned model on whole held-out reviews; `_base`: of the model
    before tuning. `trainable` counts parameters, `step_s` is the median of the train steps in seconds, `tokens_per_s`
    counts trained tokens, `peak_gib` is the process's peak host memory in `finetune`. `replicated` is the fraction of
    the weights' bytes that every device of the model axis holds. `plan_hbm` is the fraction of a chip's memory that
    this run needs by the plan, on the fullest of its topologies; above 1 it does not fit. `variants`: see there.
    """

    perplexity_base: OrAbsent[float] = None
    perplexity: OrAbsent[float] = None
    loss_base: OrAbsent[float] = None
    loss: OrAbsent[float] = None
    accuracy: OrAbsent[float] = None
    trainable: OrAbsent[int] = None
    step_s: OrAbsent[float] = None
    tokens_per_s: OrAbsent[float] = None
    peak_gib: OrAbsent[float] = None
    replicated: OrAbsent[float] = None
    plan_hbm: OrAbsent[float] = None
    variants: OrAbsent[dict[str, VariantSummary]] = None
