"""Looking for the best mesh and layout and the largest batch, mostly over programs of two and four blocks.

Purpose: a full compilation of a 7B takes a minute or two, and a search asks dozens of questions. All blocks are alike
(Gemma 3's repeat every six, their shapes do not differ), so memory, flops and bytes are a constant and a slope a block:
two small programs give both. The arguments need no compiler at all. The best candidates are then compiled whole, and
every figure says which of the two it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from stages.core.errors import StageError
from stages.core.mesh import MeshShape
from stages.core.params import PlanScaling, PlanSearch
from stages.core.plan_targets import Settings, architecture_of, request_of
from stages.core.planning import Question, answer
from stages.core.roofline import bound
from stages.core.topology import Topology, describe

# Blocks of the two small programs. Two, since the first block of LoRA needs no gradient in its input; four, so that
# what the compiler overlaps between blocks shows in the slope.
FEW, MORE = 2, 4
# The winner and so many rivals are compiled whole.
CONFIRMED = 3
# A batch that by the line through two others needs so many times the memory is not compiled to be sure.
SURELY = 1.15
# What an entry of params.yaml that leaves them out gets.
LARGEST_BATCH = 512
LAYOUTS = ["auto"]
MODEL_AXIS = 8
BATCH_PER_ROW = 8
EXTRAPOLATED = ("temporary_bytes", "code_bytes", "flops", "pass_flops", "moved_bytes", "wire_bytes")

Say = Callable[[str], None]


def search(params: Settings, wanted: PlanSearch, say: Say) -> dict[str, Any]:
    """Return the table of all candidates, best first, and every point that was looked at.

    Args:
        params: for what `wanted` leaves out.
        wanted: preset, topology, meshes, layouts and the largest batch to try.
        say: shows one line to the person.

    Returns:
        `preset`, `topology`, `memory_bytes` (a device's), `candidates` (mesh, layout, `largest_batch`, `compiled`, and
        the figures at that batch), `points` (mesh, layout, batch, needed bytes, least seconds, `fits`, `compiled`).
    """
    topology = describe(wanted.topology)
    name, found = _candidates(params, wanted, topology)
    points: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    for number, (candidate, question) in enumerate(found.items(), 1):
        say(f"Search {number} of {len(found)}: {candidate}")
        tried, best = _largest_batch(question, topology, wanted.largest_batch or LARGEST_BATCH, say)
        points += [{"name": candidate, **each} for each in tried]
        table.append({"name": candidate, **best})
    table.sort(key=_worth, reverse=True)
    for row in [row for row in table if row["fits"]][:CONFIRMED]:
        points += [{"name": row["name"], **each} for each in _confirm(row, found[row["name"]], say)]
    table.sort(key=_worth, reverse=True)
    return {
        "preset": name,
        "topology": wanted.topology,
        "memory_bytes": topology.memory_bytes,
        "candidates": table,
        "points": points,
    }


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
        model_axis = wanted.model_axis or MODEL_AXIS
        if devices % model_axis:
            raise StageError(
                f"plan.scaling.model_axis must divide the devices of each topology. Received: "
                f"model_axis={model_axis}, topology={topology_name} with {devices}."
            )
        mesh = MeshShape((devices // model_axis, model_axis))
        batch = (wanted.batch_per_row or BATCH_PER_ROW) * mesh.sizes["batch"]
        say(f"Scaling: {name} on {topology_name}, {devices} devices, batch {batch}")
        request = request_of(params, wanted, architecture, mesh, layout=wanted.layout, batch_size=batch)
        question = Question(request, topology_name)
        figures = figures_of(question, topology, argument_bytes(question), say)
        rows.append({"topology": topology_name, "devices": devices, **figures})
    return {"preset": name, "rows": rows}


def _candidates(params: Settings, wanted: PlanSearch, topology: Topology) -> tuple[str, dict[str, Question]]:
    """Return the preset's name, and a question for each mesh and layout by what it is called."""
    name, architecture = architecture_of(params, wanted)
    devices = len(topology.devices)
    shapes = wanted.meshes or [[size, devices // size] for size in range(1, devices + 1) if devices % size == 0]
    found = {}
    for shape in shapes:
        mesh = MeshShape(tuple(shape))
        if mesh.devices > devices:
            raise StageError(
                f"plan.search.meshes must fit the topology, which has {devices} devices. Received: mesh={shape}."
            )
        for layout in wanted.layouts or LAYOUTS:
            request = request_of(params, wanted, architecture, mesh, layout=layout)
            found[f"({', '.join(str(size) for size in shape)}) {layout}"] = Question(request, wanted.topology)
    return name, found


def _worth(row: dict[str, Any]) -> tuple[float, float]:
    """Most tokens a second at the bound; of equals (the products are the limit) the one that sends least a window."""
    tokens = row.get("tokens_per_second_bound") or 0.0
    return float(f"{tokens:.3g}"), -(row.get("wire_bytes") or 0) / row.get("batch_size", 1)


def _batches(step: int, largest: int) -> list[int]:
    """Return the batches to choose from: the batch axis times powers of two."""
    found = [step]
    while found[-1] * 2 <= largest:
        found.append(found[-1] * 2)
    return found


def _largest_batch(
    question: Question, topology: Topology, largest: int, say: Say
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the figures at each batch that was tried, by bisection, and those at the largest that fits."""
    request = question.request
    none = {"mesh": list(request.mesh.shape), "layout": request.layout.name, "largest_batch": 0, "fits": False}
    try:
        held = argument_bytes(question)
    except StageError as error:
        return [], {**none, "reason": str(error)}
    if topology.memory_bytes is not None and held > topology.memory_bytes:
        return [], {**none, "argument_bytes": held, "reason": "the weights alone do not fit"}
    choices = _batches(request.mesh.sizes["batch"], largest)
    tried, low, high, best = [], 0, len(choices), none
    while low < high:
        middle = (low + high) // 2
        if topology.memory_bytes is not None and _foreseen(tried, choices[middle]) > SURELY * topology.memory_bytes:
            high = middle
            continue
        figures = figures_of(question.with_batch(choices[middle]), topology, held, say)
        tried.append(figures)
        if figures["fits"]:
            low, best = middle + 1, {**figures, "largest_batch": choices[middle]}
        else:
            high = middle
    return tried, best


def _foreseen(tried: list[dict[str, Any]], batch: int) -> float:
    """Return the bytes that a batch would need by the line through the two nearest that were tried; 0 if unknown."""
    known = sorted((each["batch_size"], each["needed_bytes"]) for each in tried if each["needed_bytes"] is not None)
    nearest = sorted(known, key=lambda each: abs(each[0] - batch))[:2]
    if len(nearest) < 2:
        return 0.0
    (one, needed), (other, more) = nearest
    return needed + (more - needed) * (batch - one) / (other - one)


def argument_bytes(question: Question) -> int:
    """Return the bytes a device holds of weights, LoRA and optimizer, from shapes alone."""
    from stages.core.shapes import resolve_shapes

    request, settings = question.request, question.request.settings
    tuning = {"rank": settings.rank, "alpha": settings.alpha, "targets": settings.targets}
    placements = resolve_shapes(request.architecture, request.mesh, request.layout, request.dtype, tuning)
    return sum(each.bytes_per_device for each in placements)


def figures_of(question: Question, topology: Topology, held: int, say: Say) -> dict[str, Any]:
    """Return what a step needs on a device that holds so many bytes of state, from programs of two and four blocks."""
    few, more = (answer(dataclasses.replace(question, blocks=blocks), say) for blocks in (FEW, MORE))
    request = question.request
    base = {
        "mesh": list(request.mesh.shape),
        "layout": request.layout.name,
        "batch_size": request.settings.batch_size,
        "compiled": False,
        "argument_bytes": held,
    }
    if not (few["fits"] and more["fits"]):
        return {**base, "fits": False, "needed_bytes": None, "least_seconds": None}

    def at_full_depth(few: float, more: float) -> int:
        return round(few + (more - few) * (request.architecture.config["num_layers"] - FEW) / (MORE - FEW))

    whole = {key: at_full_depth(few[key], more[key]) for key in EXTRAPOLATED}
    counts = [{kind: found["count"] for kind, found in each["collectives"].items()} for each in (few, more)]
    kinds = sorted({*counts[0], *counts[1]})
    needed = held + more["by_kind"]["batch"] + whole["temporary_bytes"] + whole["code_bytes"]
    least = bound(topology, whole["pass_flops"], whole["moved_bytes"], whole["wire_bytes"])
    return {
        **base,
        **whole,
        "fits": topology.memory_bytes is None or needed <= topology.memory_bytes,
        "needed_bytes": needed,
        "collectives": {kind: at_full_depth(*(each.get(kind, 0) for each in counts)) for kind in kinds},
        **_speed(question, least and least.seconds, least and least.limit),
    }


def _speed(question: Question, seconds: float | None, limit: str | None) -> dict[str, Any]:
    settings = question.request.settings
    tokens = settings.batch_size * settings.gradient_accumulation * question.request.length
    return {
        "least_seconds": seconds,
        "least_limit": limit,
        "tokens_per_second_bound": tokens / seconds if seconds else None,
    }


def _confirm(row: dict[str, Any], question: Question, say: Say) -> list[dict[str, Any]]:
    """Compile a candidate whole, with a smaller batch as long as it does not fit; put the figures in its row.

    Returns:
        The figures at each batch that was compiled.
    """
    extrapolated = {key: row[key] for key in ("needed_bytes", "temporary_bytes", "least_seconds")}
    tried = []
    for batch in reversed(_batches(row["mesh"][0], row["largest_batch"])):
        asked = question.with_batch(batch)
        found = answer(asked, say)
        tried.append(
            {
                "mesh": row["mesh"],
                "layout": row["layout"],
                "batch_size": batch,
                "compiled": True,
                "fits": found["fits"],
                "needed_bytes": found.get("needed_bytes", found.get("asked_bytes")),
                **{key: found.get(key) for key in ("argument_bytes", *EXTRAPOLATED)},
                "collectives": {kind: each["count"] for kind, each in found.get("collectives", {}).items()},
                **_speed(asked, found.get("least_seconds"), found.get("least_limit")),
            }
        )
        if found["fits"]:
            if batch == row["largest_batch"]:
                row["extrapolated"] = extrapolated
            row.update(tried[-1], largest_batch=batch)
            return tried
    row.update({"fits": False, "largest_batch": 0, "tokens_per_second_bound": None})
    return tried
