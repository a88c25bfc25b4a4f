"""The table of published step times in docs/planning.md: each beside the bound and the estimate of the same step.

Purpose: `python -m stages.plan --published docs/planning.md` rewrites it between its two marks, so that what a plan is
worth can be read off measurements that others made. Only steps that this package can compile as they ran are in it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core.config.plan import PlanTarget
from stages.core.plan.compilation import compile_step
from stages.core.plan.marked import write_between
from stages.core.plan.search import argument_bytes, estimate_step
from stages.core.plan.table import milliseconds
from stages.core.plan.targets import Settings, compile_request_of
from stages.core.plan.topology import describe

logger = logging.getLogger(__name__)

BEGIN, END = "<!-- plan: published -->", "<!-- plan: end of published -->"
COLUMNS = ("step", "on", "lower bound", "estimate", "published", "published / estimate")


@dataclass(frozen=True)
class Published:
    """A step that somebody measured.

    Attributes:
        what: it is, in a few words.
        source: where the measurement is.
        target: the step as an entry of `plan.targets`.
        seconds: a step took.
        whole: compiled whole; else extrapolated from programs of a few blocks.
    """

    what: str
    source: str
    target: Mapping[str, Any]
    seconds: float
    whole: bool = True


def _rules(**specs: list[str | None]) -> list[dict[str, Any]]:
    """Return rules by the layers they are of."""
    patterns = {
        "table": "token_embedding/embeddings",
        "inputs": "decoder_block.*attention.*(query|key|value)/kernel",
        "output": "decoder_block.*attention_output/kernel",
        "gating": "decoder_block.*ffw_gating/kernel",
        "gatings": "decoder_block.*(ffw_gating|ffw_gating_2)/kernel",
        "linear": "decoder_block.*ffw_linear/kernel",
    }
    return [{"pattern": patterns[name], "spec": spec} for name, spec in specs.items()]


ON_V3: dict[str, Any] = {
    "topology": "v3:2x2",
    "mesh": [1, 8],
    "layout": "rules",
    "dtype": "float32",
    "step": "tutorial",
}
ON_V3 |= {"preset": "gemma_7b_en", "batch_size": 2, "lora_targets": ["query", "value"], "rematerialize": False}
COOKBOOK = "https://github.com/google-gemini/gemma-cookbook/blob/main"
PUBLISHED = (
    # 358 s for 2,000 steps, "163ms/step". Its printed shardings show the layout that ran; its code has another.
    Published(
        "Gemma 7B, LoRA 4, 2 x 128, float32, the tutorial's step, the layout that its output shows",
        "https://ai.google.dev/gemma/docs/core/distributed_tuning",
        {
            **ON_V3,
            "length": 128,
            "rank": 4,
            "rules": _rules(
                table=[None, "model"],
                inputs=[None, "model", None],
                output=[None, None, "model"],
                gatings=["model", None],
                linear=[None, "model"],
            ),
        },
        0.163,
    ),
    # 105 s for 1,024 steps in seven epochs of eight. Its rules name ffw_gating alone: ffw_gating_2 is on every device.
    Published(
        "Gemma 1.1 7B, LoRA 8, 2 x 256, float32, the same step, the layout of its code",
        f"{COOKBOOK}/Gemma/%5BGemma_1%5DFinetune_distributed.ipynb",
        {
            **ON_V3,
            "length": 256,
            "rank": 8,
            "rules": _rules(
                table=["model", None],
                inputs=["model", None, None],
                output=["model", None, None],
                gating=[None, "model"],
                linear=["model", None],
            ),
        },
        0.103,
    ),
    # 923 s for 1,000 steps, "888ms/step".
    Published(
        "Gemma 3 1B, LoRA 4, 1 x 256, float32, the same step",
        "https://ai.google.dev/gemma/docs/core/lora_tuning",
        {
            "preset": "gemma3_1b",
            "topology": "t4:1",
            "mesh": [1, 1],
            "layout": "auto",
            "dtype": "float32",
            "batch_size": 1,
            "length": 256,
            "rank": 4,
            "lora_targets": ["query", "value"],
            "rematerialize": False,
            "step": "tutorial",
        },
        0.888,
    ),
    # 1.21 s a sample, in groups of eight; Gemma 4 31B has 1.15 times the weights.
    Published(
        "Gemma 3 27B in place of Gemma 4 31B, LoRA 64 on all matrices, 1 x 3072, bfloat16, recomputed by block",
        "https://arxiv.org/abs/2605.25645",
        {
            "preset": "gemma3_27b_text",
            "topology": "v5p:2x2x1",
            "mesh": [1, 4],
            "layout": "auto",
            "dtype": "bfloat16",
            "batch_size": 1,
            "length": 3072,
            "rank": 64,
            "lora_targets": ["attention/.*", "ffw_.*"],
            "rematerialize": True,
            "step": "ours",
        },
        1.21,
        whole=False,
    ),
)


def write_table(params: Settings, file: Path) -> None:
    """Write the table between the two marks of a Markdown file.

    Args:
        params: the training's other settings.
        file: a text file with the lines `BEGIN` and `END`.

    Raises:
        ParamsError: there is no such file, or the marks are not in it.
    """
    write_between(file, BEGIN, END, lambda: table(params), "--published")


def table(params: Settings) -> str:
    """Return the table as Markdown, a line per step."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for each in PUBLISHED:
        logger.info(f"{each.what}, on {each.target['topology']}")
        bound, expected = planned(params, each)
        ratio = f"{each.seconds / expected:.2f}" if expected else ""
        cells = (f"[{each.what}]({each.source})", each.target["topology"], milliseconds(bound), milliseconds(expected))
        lines.append(f"| {' | '.join((*cells, milliseconds(each.seconds), ratio))} |")
    return "\n".join(lines)


def planned(params: Settings, step: Published) -> tuple[float | None, float | None]:
    """Return the lower bound and the estimate of a published step, in seconds; None where it does not fit."""
    # What the entry does not say is the tutorial's: no settings of params.yaml but these shape a step.
    finetune = params.finetune.model_copy(
        update={"alpha": None, "lora_dropout": 0.0, "gradient_accumulation": 1, "clip_norm": None}
    )
    settings = dataclasses.replace(params, finetune=finetune)
    _, request = compile_request_of(settings, PlanTarget.model_validate(step.target))
    if step.whole:
        cost = compile_step(request)
        return cost.bound.seconds if cost.bound else None, cost.estimated_seconds
    found = estimate_step(request, describe(request.topology), argument_bytes(request))
    return found.step_seconds_lower_bound, found.estimated_step_seconds
