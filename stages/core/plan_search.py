"""Looking for the best mesh and layout and the largest batch, mostly over programs of two and four blocks.

Purpose: a full compilation of a 7B takes a minute or two, and a search asks dozens of questions. All blocks are alike
(Gemma 3's repeat every six, their shapes do not differ), so memory, flops and bytes are a constant and a slope a block:
two small programs give both. The arguments need no compiler at all. The best candidates are then compiled whole, and
every figure says which of the two it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stages.core.errors import StageError
from stages.core.layouts import make_layout
from stages.core.mesh import MeshShape
from stages.core.params import PlanScaling, PlanSearch
from stages.core.plan_targets import Settings, architecture_of, limit_of
from stages.core.planning import Question, answer
from stages.core.roofline import bound
from stages.core.topology import Topology, describe

# Blocks of the two small programs. Two, since the first block of LoRA needs no gradient in its input; four, so that
# what the compiler overlaps between blocks shows in the slope.
FEW, MORE = 2, 4
# The winner and so many rivals are compiled whole.
CONFIRMED = 3
EXTRAPOLATED = ("temporary_bytes", "code_bytes", "flops", "moved_bytes", "wire_bytes")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """A mesh and a layout, without a batch."""

    question: Question

    @property
    def name(self) -> str:
        """Mesh and layout as text."""
        request = self.question.request
        return f"({', '.join(str(size) for size in request.mesh.shape)}) {request.layout.name}"

    def with_batch(self, batch: int) -> Question:
        """Return the question for a batch size in windows."""
        request = self.question.request
        settings = request.settings.model_copy(update={"batch_size": batch})
        return dataclasses.replace(self.question, request=dataclasses.replace(request, settings=settings))


def search(params: Settings, wanted: PlanSearch, say: Say) -> dict[str, Any]:
    """Return the table of all candidates, best first, and every point that was looked at.

    Args:
        params: for what `wanted` leaves out.
        wanted: preset, topology, meshes, layouts and the largest batch to try.
        say: shows one line to the person.

    Returns:
        `preset`, `topology`, `candidates` (mesh, layout, `largest_batch`, `compiled`, and the figures at that batch),
        `points` (mesh, layout, batch, needed bytes, least seconds, `fits`, `compiled`).
    """
    topology = describe(wanted.topology)
    name, found = _candidates(params, wanted, topology)
    points: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    for number, candidate in enumerate(found, 1):
        say(f"Search {number} of {len(found)}: {candidate.name}")
        best = _largest_batch(candidate, topology, wanted.largest_batch, points, say)
        table.append({**_identity(candidate), **(best or {"largest_batch": 0, "fits": False})})
    table.sort(key=_tokens_bound, reverse=True)
    by_name = {candidate.name: candidate for candidate in found}
    for row in [row for row in table if row["fits"]][:CONFIRMED]:
        _confirm(row, by_name[row["name"]], topology, points, say)
    table.sort(key=_tokens_bound, reverse=True)
    return {"preset": name, "topology": wanted.topology, "candidates": table, "points": points}


def scaling(params: Settings, wanted: PlanScaling, say: Say) -> dict[str, Any]:
    """Return how one step changes with the number of chips: extrapolated from small programs, the batch growing along.

    Returns:
        `preset` and `rows`: topology, devices, mesh, batch, and the figures for one device.
    """
    name, architecture = architecture_of(params, wanted)
    rows = []
    for topology_name in wanted.topologies:
        topology = describe(topology_name)
        devices = len(topology.devices)
        if devices % wanted.model_axis:
            raise StageError(
                f"plan.scaling.model_axis must divide the devices of each topology. Received: "
                f"model_axis={wanted.model_axis}, topology={topology_name} with {devices}."
            )
        mesh = MeshShape((devices // wanted.model_axis, wanted.model_axis))
        named = (
            params.layout
            if wanted.layout is None
            else params.layout.model_copy(update={"name": wanted.layout, "rules": None})
        )
        candidate = Candidate(Question(_request(params, wanted, architecture, mesh, named), topology_name))
        batch = wanted.batch_per_row * mesh.sizes["batch"]
        say(f"Scaling: {name} on {topology_name}, {devices} devices, batch {batch}")
        rows.append(
            _figures(candidate.with_batch(batch), topology, batch, say)
            | {"topology": topology_name, "devices": devices}
        )
    return {"preset": name, "rows": rows}


def _request(
    params: Settings, wanted: PlanSearch | PlanScaling, architecture: Any, mesh: MeshShape, layout: Any
) -> Any:
    from stages.core.step_program import StepRequest

    changes = {"rank": wanted.rank, "rematerialize": wanted.rematerialize}
    settings = params.finetune.model_copy(update={key: value for key, value in changes.items() if value is not None})
    named = make_layout(layout, architecture, mesh)
    return StepRequest(
        architecture, mesh, named, wanted.dtype or params.load.dtype, settings, wanted.length or params.tokenize.length
    )


def _candidates(params: Settings, wanted: PlanSearch, topology: Topology) -> tuple[str, list[Candidate]]:
    name, architecture = architecture_of(params, wanted)
    devices = len(topology.devices)
    shapes = wanted.meshes or [[size, devices // size] for size in range(1, devices + 1) if devices % size == 0]
    found = []
    for shape in shapes:
        mesh = MeshShape(tuple(shape))
        if mesh.devices > devices:
            raise StageError(
                f"plan.search.meshes must fit the topology, which has {devices} devices. Received: mesh={shape}."
            )
        for layout in wanted.layouts:
            named = params.layout.model_copy(update={"name": layout, "rules": None})
            found.append(Candidate(Question(_request(params, wanted, architecture, mesh, named), wanted.topology)))
    return name, found


def _identity(candidate: Candidate) -> dict[str, Any]:
    request = candidate.question.request
    return {"name": candidate.name, "mesh": list(request.mesh.shape), "layout": request.layout.name}


def _tokens_bound(row: dict[str, Any]) -> float:
    return row.get("tokens_per_second_bound") or 0.0


def _batches(step: int, largest: int) -> list[int]:
    """Return the batches to choose from: the batch axis times powers of two."""
    found = [step]
    while found[-1] * 2 <= largest:
        found.append(found[-1] * 2)
    return found


def _largest_batch(
    candidate: Candidate, topology: Topology, largest: int, points: list[dict[str, Any]], say: Say
) -> dict[str, Any] | None:
    """Return the figures at the largest batch that fits, found by bisection, or None if the smallest does not."""
    try:
        held = _argument_bytes(candidate)
    except StageError as error:
        say(f"  {candidate.name}: {error}")
        return {"largest_batch": 0, "fits": False, "reason": str(error)}
    if topology.chip is not None and held > topology.chip.memory_bytes // topology.devices_per_chip:
        return {"largest_batch": 0, "fits": False, "argument_bytes": held, "reason": "the weights alone do not fit"}
    choices = _batches(candidate.question.request.mesh.sizes["batch"], largest)
    low, high, best = 0, len(choices), None
    while low < high:
        middle = (low + high) // 2
        figures = _figures(candidate.with_batch(choices[middle]), topology, choices[middle], say)
        points.append({**_identity(candidate), **figures})
        if figures["fits"]:
            low, best = middle + 1, figures
        else:
            high = middle
    return None if best is None else {**best, "largest_batch": best["batch_size"]}


def _argument_bytes(candidate: Candidate) -> int:
    """Return the bytes a device holds of weights, LoRA and optimizer, from shapes alone."""
    from stages.core.shapes import resolve_shapes

    request = candidate.question.request
    tuning = {
        "rank": request.settings.rank,
        "alpha": request.settings.alpha,
        "targets": request.settings.targets,
    }
    placements = resolve_shapes(request.architecture, request.mesh, request.layout, request.dtype, tuning)
    return sum(each.bytes_per_device for each in placements)


def _figures(question: Question, topology: Topology, batch: int, say: Say) -> dict[str, Any]:
    """Return what a step needs, from programs of two and four blocks."""
    few, more = (answer(dataclasses.replace(question, blocks=blocks), say) for blocks in (FEW, MORE))
    candidate = Candidate(question)
    request = question.request
    held = _argument_bytes(candidate)
    base = {
        "mesh": list(request.mesh.shape),
        "layout": request.layout.name,
        "batch_size": batch,
        "compiled": False,
        "argument_bytes": held,
    }
    if not (few["fits"] and more["fits"]) or "flops" not in more:
        return {**base, "fits": False, "needed_bytes": None, "least_seconds": None}
    blocks = request.architecture.config["num_layers"]
    whole = {key: round(few[key] + (more[key] - few[key]) * (blocks - FEW) / (MORE - FEW)) for key in EXTRAPOLATED}
    collectives = {
        kind: round(
            few["collectives"].get(kind, {"count": 0})["count"]
            + (
                more["collectives"].get(kind, {"count": 0})["count"]
                - few["collectives"].get(kind, {"count": 0})["count"]
            )
            * (blocks - FEW)
            / (MORE - FEW)
        )
        for kind in sorted({*few["collectives"], *more["collectives"]})
    }
    needed = held + more["by_kind"]["batch"] + whole["temporary_bytes"] + whole["code_bytes"]
    least = bound(topology, whole["flops"], whole["moved_bytes"], whole["wire_bytes"])
    memory = None if topology.chip is None else topology.chip.memory_bytes // topology.devices_per_chip
    return {
        **base,
        **whole,
        "fits": memory is None or needed <= memory,
        "needed_bytes": needed,
        "collectives": collectives,
        **_speed(
            None if least is None else least.seconds, None if least is None else least.limit, batch, request.length
        ),
    }


def _speed(seconds: float | None, limit: str | None, batch: int, length: int) -> dict[str, Any]:
    return {
        "least_seconds": seconds,
        "least_limit": limit,
        "tokens_per_second_bound": None if not seconds else batch * length / seconds,
    }


def _confirm(
    row: dict[str, Any], candidate: Candidate, topology: Topology, points: list[dict[str, Any]], say: Say
) -> None:
    """Compile a candidate whole, with a smaller batch as long as it does not fit, and put its figures in the row."""
    extrapolated = {key: row[key] for key in ("needed_bytes", "temporary_bytes", "least_seconds")}
    for batch in reversed(_batches(row["mesh"][0], row["largest_batch"])):
        question = candidate.with_batch(batch)
        found = answer(question, say)
        figures = {
            "batch_size": batch,
            "compiled": True,
            "fits": found["fits"],
            "needed_bytes": found.get("needed_bytes", found.get("asked_bytes")),
            **{key: found.get(key) for key in ("argument_bytes", *EXTRAPOLATED)},
            "collectives": {kind: each["count"] for kind, each in found.get("collectives", {}).items()},
            **_speed(found.get("least_seconds"), limit_of(found), batch, question.request.length),
        }
        points.append({**_identity(candidate), **figures})
        if found["fits"]:
            same = batch == row["largest_batch"]
            row.update(figures, largest_batch=batch)
            if same:
                row["extrapolated"] = extrapolated
            return
    row.update({"fits": False, "largest_batch": 0, "tokens_per_second_bound": None})
