"""The table of all public Gemmas in docs/planning.md: each on the smallest topology that holds it, LoRA and in full.

Purpose: `python -m stages.plan --presets docs/planning.md` rewrites it between its two marks. Like the search it uses
programs of two and four blocks, so each preset takes minutes, not an hour; results are cached.
"""

from __future__ import annotations

import logging
from pathlib import Path

from stages.core.config.plan import PlanStep
from stages.core.config.section import Dtype
from stages.core.fetch import catalog
from stages.core.plan.compilation import CompileRequest
from stages.core.plan.marked import write_between
from stages.core.plan.search import argument_bytes, estimate_step
from stages.core.plan.table import size
from stages.core.plan.targets import Settings, step_of
from stages.core.plan.topology import describe
from stages.core.records.plan import Estimate
from stages.core.sharding.mesh import MeshShape

logger = logging.getLogger(__name__)

# The smallest first. All have eight devices or more on the model axis, as the tutorial's mesh has.
LADDER = (("v5e:2x4", (1, 8)), ("v5p:2x2x2", (1, 8)), ("v5p:2x2x4", (1, 16)))
LENGTH, BATCH, RANK, TARGETS = 512, 8, 4, ["query", "value"]
# Full fine-tuning needs float32 weights; arithmetic in bfloat16.
DTYPES: dict[int, Dtype] = {RANK: "bfloat16", 0: "mixed_bfloat16"}
BEGIN, END = "<!-- plan: presets -->", "<!-- plan: end -->"


def write_table(params: Settings, file: Path) -> None:
    """Write the table between the two marks of a Markdown file.

    Args:
        params: the training's other settings.
        file: a text file with the lines `BEGIN` and `END`.

    Raises:
        ParamsError: there is no such file, or the marks are not in it.
    """
    write_between(file, BEGIN, END, lambda: table(params), "--presets")


def table(params: Settings) -> str:
    """Return the table as Markdown, a line per preset."""
    columns = ("topology", "memory per device", "step time >=", "estimate")
    lines = [
        f"| preset | LoRA r={RANK}: {' | '.join(columns)} | full: {' | '.join(columns)} |",
        "|---" * (1 + 2 * len(columns)) + "|",
    ]
    for name in catalog.GEMMAS:
        cells = [cell for rank in DTYPES for cell in _cells(smallest(params, name, rank))]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def smallest(params: Settings, name: str, rank: int) -> Estimate | None:
    """Return the estimate of a preset on the first topology of the ladder that its step fits on, or None."""
    architecture = catalog.architecture(name)
    settings = PlanStep(preset=name, dtype=DTYPES[rank], length=LENGTH, rank=rank, lora_targets=TARGETS)
    for topology_name, shape in LADDER:
        topology = describe(topology_name)
        step = step_of(params, settings, architecture, MeshShape(shape), layout="auto", batch_size=BATCH)
        request = CompileRequest(step, topology_name)
        held = argument_bytes(request)
        if topology.memory_bytes is not None and held >= topology.memory_bytes:
            continue
        logger.info(f"{name}, {f'rank {rank}' if rank else 'in full'}, on {topology_name}")
        estimate = estimate_step(request, topology, held)
        if estimate.fits:
            return estimate.model_copy(update={"topology": topology_name})
    return None


def _cells(estimate: Estimate | None) -> tuple[str, str, str, str]:
    if estimate is None:
        return "none of these", "", "", ""
    bound = f"{(estimate.step_seconds_lower_bound or 0) * 1e3:.0f} ms ({estimate.bound_by})"
    expected = f"{(estimate.estimated_step_seconds or 0) * 1e3:.0f} ms"
    return estimate.topology, size(estimate.needed_bytes), bound, expected
