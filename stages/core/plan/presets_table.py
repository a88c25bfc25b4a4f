"""The tables of public Gemmas in docs/planning.md: all, each on the smallest topology that holds it, LoRA and in full;
and the latest, LoRA alone, on the fewest chips of each kind, in bfloat16 and in int8.

Purpose: `python -m stages.plan --presets docs/planning.md` rewrites them between two marks. Like the search it uses
small programs, so each preset takes minutes, not an hour. Results are cached, so that a stopped run resumes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
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
# The latest Gemmas, with blocks computed again in the backward pass, on the fewest chips of a kind: of one, too.
LATEST = ("vault_gemma_1b_en", "gemma4_2b", "gemma4_4b", "gemma4_26b_a4b", "gemma4_31b")
FORMS: tuple[Dtype, ...] = ("bfloat16", "int8")
CHIPS_OF = {
    "v5e": (("v5e:2x2", (1, 1)), ("v5e:2x2", (1, 4)), ("v5e:2x4", (1, 8))),
    "v6e": (("v6e:2x2", (1, 1)), ("v6e:2x2", (1, 4)), ("v6e:2x4", (1, 8))),
    "v5p": (("v5p:2x2x1", (1, 1)), ("v5p:2x2x1", (1, 4))),
    "h100": (("h100:1", (1, 1)), ("h100:2", (1, 2)), ("h100:4", (1, 4))),
}
BEGIN, END = "<!-- plan: presets -->", "<!-- plan: end -->"


def write_table(params: Settings, file: Path) -> None:
    """Write the tables between the two marks of a Markdown file.

    Args:
        params: the training's other settings.
        file: a text file with the lines `BEGIN` and `END`.

    Raises:
        ParamsError: there is no such file, or the marks are not in it.
    """
    write_between(file, BEGIN, END, lambda: tables(params), "--presets")


def tables(params: Settings) -> str:
    """Return both tables as Markdown, the second of the latest presets that there are."""
    latest = [name for name in LATEST if name in catalog.GEMMAS]
    return "\n".join([table(params), *(["", table_of_chips(params, latest)] if latest else [])])


def table(params: Settings) -> str:
    """Return the table of all presets, a line for each."""
    columns = ("topology", "memory per device", "step time >=", "estimate")
    lines = [
        f"| preset | LoRA r={RANK}: {' | '.join(columns)} | full: {' | '.join(columns)} |",
        "|---" * (1 + 2 * len(columns)) + "|",
    ]
    for name in catalog.GEMMAS:
        cells = [cell for rank in DTYPES for cell in _cells(smallest(params, name, rank))]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def table_of_chips(params: Settings, names: Sequence[str]) -> str:
    """Return the table of some presets by kinds of chips, a line for each preset and dtype."""
    lines = [f"| preset | base | {' | '.join(CHIPS_OF)} |", "|---" * (2 + len(CHIPS_OF)) + "|"]
    for name in names:
        for dtype in FORMS:
            found = [smallest(params, name, RANK, dtype, ladder, rematerialize=True) for ladder in CHIPS_OF.values()]
            lines.append(f"| {' | '.join([name, dtype, *map(_on_chips, found)])} |")
    return "\n".join(lines)


def smallest(
    params: Settings,
    name: str,
    rank: int,
    dtype: Dtype | None = None,
    ladder: Sequence[tuple[str, tuple[int, int]]] = LADDER,
    rematerialize: bool | None = None,
) -> Estimate | None:
    """Return the estimate of a preset on the first topology of a ladder that its step fits on, or None.

    Args:
        params: the training's other settings.
        name: of the preset.
        rank: of the adapter; 0: in full.
        dtype: None: that of `DTYPES`.
        ladder: topologies and meshes, the smallest first.
        rematerialize: None: as in `params`.
    """
    architecture = catalog.architecture(name)
    settings = PlanStep(
        preset=name,
        dtype=dtype or DTYPES[rank],
        length=LENGTH,
        rank=rank,
        lora_targets=TARGETS,
        rematerialize=rematerialize,
    )
    for topology_name, shape in ladder:
        topology = describe(topology_name)
        step = step_of(params, settings, architecture, MeshShape(shape), layout="auto", batch_size=BATCH)
        request = CompileRequest(step, topology_name)
        held = argument_bytes(request)
        if topology.memory_bytes is not None and held >= topology.memory_bytes:
            continue
        logger.info(f"{name}, {settings.dtype}, {f'rank {rank}' if rank else 'in full'}, on {topology_name} {shape}")
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


def _on_chips(estimate: Estimate | None) -> str:
    if estimate is None:
        return "none of these"
    chips, seconds = math.prod(estimate.mesh), estimate.estimated_step_seconds
    time = f", {seconds * 1e3:.0f} ms" if seconds else ""
    return f"{chips}: {size(estimate.needed_bytes)}{time}{'' if estimate.compiled else '*'}"
