"""The training curve, the samples on its way and the metrics: `finetune` writes them, `report` and DVC read them."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Iterable
from pathlib import Path

from pydantic import ValidationError

from stages.core.common.paths import Paths
from stages.core.files import atomic_path
from stages.core.records.record import FileRecord, LineRecord, OrAbsent, Record, broken, problem, read_text


class Step(Record):
    """A row of `data/plots/finetune.csv`: one optimizer step.

    `step` and `epoch` count from 1. `loss` is in nats per token that is trained on (`tokens`), `accuracy` the share of
    these that were predicted; `positions_per_second` counts prompts and padding too. `validation_loss` is None where it
    was not measured.
    """

    step: int
    epoch: int
    loss: float
    accuracy: float
    tokens: int
    tokens_per_second: float
    positions_per_second: float
    learning_rate: float
    validation_loss: float | None


class Sample(LineRecord):
    """A line of `data/plots/samples.jsonl`: what the prompt was continued with after a step."""

    step: int
    prompt: str
    text: str


class FinetuneMetrics(FileRecord):
    """`data/metrics/finetune.json`: the training run, over all the processes that it took.

    The first step of a process holds the compilation; what it took beyond a usual step is `compile_seconds`. First and
    last loss are means over the tokens of up to 10 steps, since single batches scatter. `tokens_per_second` counts the
    trained tokens, `positions_per_second` all that the devices compute: prompts and padding too.
    `validation_seconds` and `sample_seconds` hold their own compilations; `checkpoint_seconds` is what steps waited for
    checkpoints, which are written beside them. `peak_device_bytes` is there only if the
    backend reports it. `flops_share_of_peak` is the model flops per second of a usual step over what the devices'
    float32 matrix products reach together, measured after the training. `state_bytes_per_device` is what the first
    device holds of weights, optimizer and metrics; `step_growth_bytes` how far the process's memory grew within one
    step: on simulated devices, the temporaries of all of them. `device_kind` is what JAX calls the devices.
    `busiest_expert_share` is there only of a model with experts: of each step the largest share of its tokens that an
    expert of any block was sent, the mean over the steps; sent evenly, it would be chosen / experts (26B-A4B: 0.0625).
    """

    total_parameters: int
    trainable_parameters: int
    steps: int
    tokens: int
    loss_first: float
    loss_last: float
    tokens_per_second: float
    positions_per_second: float
    step_seconds_median: float
    compile_seconds: float
    load_seconds: float
    train_seconds: float
    validation_seconds: float
    sample_seconds: float
    checkpoint_seconds: float
    peak_host_bytes: int
    peak_device_bytes: OrAbsent[int] = None
    state_bytes_per_device: int
    step_growth_bytes: OrAbsent[int] = None
    flops_per_step: int
    flops_per_second_of_matrix_product: int
    flops_share_of_peak: float
    device_kind: OrAbsent[str] = None
    busiest_expert_share: OrAbsent[float] = None


def write_curve(path: Path, steps: Iterable[Step]) -> None:
    """Write the steps as CSV, one per row, numbers to six digits."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(Step.model_fields)
        for step in steps:
            writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for _, value in step)


def live_curve(path: Path) -> Callable[[list[Step]], None] | None:
    """Return what writes the steps during a run; None where a file is already.

    A run that fails leaves what an earlier one wrote; DVC takes that away before it begins.
    """
    return None if path.exists() else functools.partial(write_curve, path)


def read_curve(paths: Paths, relative: str) -> list[Step]:
    """Read what `write_curve` wrote.

    Raises:
        StageError: the file does not exist, or does not have its form.
    """
    reader = csv.DictReader(read_text(paths, relative).splitlines())
    columns = list(Step.model_fields)
    if reader.fieldnames != columns:
        raise broken(relative, f"it must have the columns {', '.join(columns)}. Received: {reader.fieldnames}")
    steps = []
    for row in reader:
        try:
            steps.append(Step.model_validate({name: value or None for name, value in row.items()}))
        except (TypeError, ValidationError) as error:
            what = problem(error) if isinstance(error, ValidationError) else str(error)
            raise broken(relative, f"line {reader.line_num}: {what}") from error
    return steps
