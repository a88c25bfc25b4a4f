"""Search for the best mesh and layout and the largest batch, mostly over programs of a few blocks.

A full compilation of a 7B takes a minute or two, and a search needs dozens. Mostly all blocks are alike, so memory,
flops and bytes are a constant plus a slope per block: two small programs, of two and of four blocks, give both. Gemma
4's shapes repeat every six blocks, and so do Gemma 3's windows where sequences are longer, so these programs are of six
and of twelve. Sizes of Gemma 4 in which blocks share keys and values are compiled whole. The arguments need no compiler
at all. The best candidates are then compiled whole, and every figure says which of the two it is.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from typing import Any

from stages.core.common.errors import StageError
from stages.core.config.plan import PlanScaling, PlanSearch
from stages.core.plan.compilation import CompileRequest, StepCost, compile_step
from stages.core.plan.roofline import Bound, lower_bound
from stages.core.plan.shapes import resolve_shapes
from stages.core.plan.targets import OVER_BATCH, Settings, architecture_of, step_of
from stages.core.plan.topology import Topology, describe
from stages.core.presets.architecture import Architecture
from stages.core.presets.layer_kinds import first_sharing, period
from stages.core.records.layout import OverBatch
from stages.core.records.plan import Estimate, Scaling, Search, StepTime
from stages.core.sharding.mesh import MeshShape

logger = logging.getLogger(__name__)

# Blocks of the two small programs. Two, since the first block of LoRA needs no gradient in its input; four, so that
# what the compiler overlaps between blocks shows in the slope.
FEW, MORE = 2, 4
# This many of the best candidates are compiled whole.
CONFIRMED = 3
# Skip a batch whose linearly extrapolated memory exceeds the device by this factor.
SURELY = 1.15
# Defaults of what an entry of params.yaml leaves out.
LARGEST_BATCH = 512
LAYOUTS = ["auto"]
MODEL_AXIS = 8
BATCH_PER_ROW = 8
WORK = ("flops", "pass_flops", "float32_flops", "hbm_traffic_bytes", "interconnect_bytes")
EXTRAPOLATED = ("temporary_bytes", "code_bytes", *WORK)


def search(params: Settings, settings: PlanSearch) -> Search:
    """Return all candidates, best first, and every point that was looked at.

    Args:
        params: for what `settings` leaves out.
        settings: preset, topology, meshes, layouts and the largest batch to try.
    """
    topology = describe(settings.topology)
    name, requests = _candidates(params, settings, topology)
    points: list[Estimate] = []
    table: list[Estimate] = []
    for number, (candidate, request) in enumerate(requests.items(), 1):
        logger.info(f"Search {number} of {len(requests)}: {candidate}")
        tried, best = _largest_batch(request, topology, settings.largest_batch or LARGEST_BATCH)
        points += [_named(candidate, point) for point in tried]
        table.append(_named(candidate, best))
    table.sort(key=_worth, reverse=True)
    for row in [row for row in table if row.fits][:CONFIRMED]:
        tried, confirmed = _confirm(row, requests[row.name])
        points += [_named(row.name, point) for point in tried]
        table[table.index(row)] = confirmed
    table.sort(key=_worth, reverse=True)
    return Search(
        preset=name, topology=settings.topology, memory_bytes=topology.memory_bytes, candidates=table, points=points
    )


def scaling(params: Settings, settings: PlanScaling) -> Scaling:
    """Return how a step changes with the number of chips: extrapolated from small programs, the batch growing along."""
    name, architecture = architecture_of(params, settings)
    rows = []
    for topology_name in settings.topologies:
        topology = describe(topology_name)
        devices = len(topology.devices)
        model_axis = settings.model_axis or MODEL_AXIS
        if devices % model_axis:
            raise StageError(
                f"plan.scaling.model_axis must divide the devices of each topology. Received: "
                f"model_axis={model_axis}, topology={topology_name} with {devices}."
            )
        mesh = MeshShape((devices // model_axis, model_axis))
        batch = (settings.batch_per_row or BATCH_PER_ROW) * mesh.sizes["batch"]
        logger.info(f"Scaling: {name} on {topology_name}, {devices} devices, batch {batch}")
        step = step_of(
            params,
            settings,
            architecture,
            mesh,
            layout=settings.layout,
            shard_over_batch=settings.shard_over_batch,
            batch_size=batch,
        )
        request = CompileRequest(step, topology_name)
        estimate = estimate_step(request, topology, argument_bytes(request))
        rows.append(estimate.model_copy(update={"topology": topology_name, "devices": devices}))
    return Scaling(preset=name, rows=rows)


def _named(name: str, estimate: Estimate) -> Estimate:
    return estimate.model_copy(update={"name": name})


def _candidates(params: Settings, settings: PlanSearch, topology: Topology) -> tuple[str, dict[str, CompileRequest]]:
    """Return the preset's name, and a request for each mesh and layout by what it is called."""
    name, architecture = architecture_of(params, settings)
    devices = len(topology.devices)
    shapes = settings.meshes or [[size, devices // size] for size in range(1, devices + 1) if devices % size == 0]
    requests = {}
    for shape in shapes:
        mesh = MeshShape(tuple(shape))
        if mesh.devices > devices:
            raise StageError(
                f"plan.search.meshes must fit the topology, which has {devices} devices. Received: mesh={shape}."
            )
        # With one row of the mesh there is nothing to split over the batch axis.
        modes: Sequence[OverBatch | None] = (settings.shard_over_batch or [None]) if mesh.sizes["batch"] > 1 else [None]
        for layout, mode in itertools.product(settings.layouts or LAYOUTS, modes):
            step = step_of(params, settings, architecture, mesh, layout=layout, shard_over_batch=mode)
            called = [f"({', '.join(str(size) for size in shape)}) {layout}"]
            called += [OVER_BATCH[mode]] if mode in OVER_BATCH else []
            requests[", ".join(called)] = CompileRequest(step, settings.topology)
    return name, requests


def _worth(row: Estimate) -> tuple[float, float]:
    """Most tokens per second; among equals (as where compute is the limit and there is but a bound), least sent."""
    return float(f"{row.speed:.3g}"), -(row.interconnect_bytes or 0) / (row.batch_size or 1)


def _batches(step: int, largest: int) -> list[int]:
    """Return the batches to choose from: the batch axis times powers of two."""
    batches = [step]
    while batches[-1] * 2 <= largest:
        batches.append(batches[-1] * 2)
    return batches


def _largest_batch(request: CompileRequest, topology: Topology, largest: int) -> tuple[list[Estimate], Estimate]:
    """Return the estimate of each batch that was tried, by bisection, and that of the largest that fits."""
    step = request.step
    none = Estimate(
        mesh=list(step.mesh.shape),
        layout=step.layout.name,
        shard_over_batch=step.layout.shard_over_batch,
        largest_batch=0,
        fits=False,
    )
    try:
        held = argument_bytes(request)
    except StageError as error:
        return [], none.model_copy(update={"reason": str(error)})
    memory = topology.memory_bytes
    if memory is not None and held > memory:
        return [], none.model_copy(update={"argument_bytes": held, "reason": "the weights alone do not fit"})
    choices = _batches(step.mesh.sizes["batch"], largest)
    tried: list[Estimate] = []
    low, high, best = 0, len(choices), none
    while low < high:
        middle = (low + high) // 2
        if memory is not None and _extrapolated_bytes(tried, choices[middle]) > SURELY * memory:
            high = middle
            continue
        estimate = estimate_step(request.with_batch(choices[middle]), topology, held)
        tried.append(estimate)
        if estimate.fits:
            low, best = middle + 1, estimate.model_copy(update={"largest_batch": choices[middle]})
        else:
            high = middle
    return tried, best


def _extrapolated_bytes(tried: list[Estimate], batch: int) -> float:
    """Return the bytes that a batch needs by the line through the two nearest that were tried; 0 if unknown."""
    known = sorted((one.batch_size or 0, one.needed_bytes) for one in tried if one.needed_bytes is not None)
    nearest = sorted(known, key=lambda point: abs(point[0] - batch))[:2]
    if len(nearest) < 2:
        return 0.0
    (one, needed), (other, more) = nearest
    return needed + (more - needed) * (batch - one) / (other - one)


def argument_bytes(request: CompileRequest) -> int:
    """Return the bytes of weights, LoRA kernels and optimizer state per device, from shapes alone."""
    step = request.step
    placements = resolve_shapes(step.architecture, step.mesh, step.layout, step.dtype, step.settings.lora)
    return sum(placement.bytes_per_device for placement in placements)


def small_programs(architecture: Architecture, length: int) -> tuple[int, int] | None:
    """Return the blocks of the two small programs for sequences of some length.

    None, for the whole model alone, where blocks share keys and values: with these there are two slopes, and the three
    small programs would have more blocks together than the model.
    """
    every = period(architecture, length)
    if first_sharing(architecture) < architecture.config["num_layers"]:
        return None
    return (FEW, MORE) if every == 1 else (every, 2 * every)


def _compiled(request: CompileRequest) -> tuple[list[StepCost], float]:
    """Return the costs of two small programs, or of the whole model, and how often their difference is added to the
    first.

    What a step needs at its peak is a slope and a constant, give or take how the compiler schedules each program: full
    training of Gemma 3 27B on a v5e:8x8 took 4.1, 3.0, 4.3 and 3.2 GiB of temporaries with 2, 4, 8 and 16 blocks. So
    twice as many are compiled until they need as much as the fewest, and the slope is taken over all that lies between.
    """
    step = request.step
    count, blocks = step.architecture.config["num_layers"], small_programs(step.architecture, step.length)
    if blocks is None:
        return [compile_step(request)], 0.0
    few, more = blocks
    one, other = (compile_step(dataclasses.replace(request, blocks=number)) for number in blocks)
    while one.fits and other.fits and (other.temporary_bytes or 0) < (one.temporary_bytes or 0) and more < count:
        more = min(2 * more, count)
        other = compile_step(dataclasses.replace(request, blocks=more))
    return [one, other], (count - few) / (more - few)


def estimate_step(request: CompileRequest, topology: Topology, held: int) -> Estimate:
    """Return what a step needs, extrapolated from small programs, or of the whole model where there are none.

    Args:
        request: the step and the topology's name.
        topology: that topology.
        held: bytes of state per device, from `argument_bytes`.
    """
    step = request.step
    costs, often = _compiled(request)
    estimate = Estimate(
        mesh=list(step.mesh.shape),
        layout=step.layout.name,
        shard_over_batch=step.layout.shard_over_batch,
        batch_size=step.settings.batch_size,
        argument_bytes=held,
        compiled=len(costs) == 1,
        fits=False,
    )
    if not all(cost.fits for cost in costs):
        return estimate

    def at_full_depth(values: Sequence[float]) -> float:
        return values[0] + often * (values[-1] - values[0])

    whole = {key: round(at_full_depth([getattr(cost, key) for cost in costs])) for key in EXTRAPOLATED}
    times, time = [cost.step_time for cost in costs], None
    if all(times):
        # A part of a nearly empty slope may come out below zero.
        parts = {key: max(0.0, at_full_depth([getattr(each, key) for each in times])) for key in StepTime.model_fields}
        time = StepTime(**parts)
    counts = [{kind: found.count for kind, found in cost.collectives.items()} for cost in costs]
    kinds = sorted({kind for count in counts for kind in count})
    needed = held + costs[0].by_kind["batch"] + whole["temporary_bytes"] + whole["code_bytes"]
    bound = lower_bound(topology, whole)
    return estimate.model_copy(
        update={
            **whole,
            "fits": topology.memory_bytes is None or needed <= topology.memory_bytes,
            "needed_bytes": needed,
            "collectives": {kind: round(at_full_depth([count.get(kind, 0) for count in counts])) for kind in kinds},
            **_speed(request, bound, time),
        }
    )


def _speed(request: CompileRequest, bound: Bound | None, time: StepTime | None) -> dict[str, Any]:
    settings = request.step.settings
    tokens = settings.batch_size * settings.gradient_accumulation * request.step.length
    expected = max(time.seconds, bound.seconds) if time and bound else None
    return {
        "step_seconds_lower_bound": bound and bound.seconds,
        "bound_by": bound and bound.bound_by,
        "tokens_per_second_upper_bound": bound and tokens / bound.seconds,
        "step_time": time,
        "estimated_step_seconds": expected,
        "tokens_per_second": expected and tokens / expected,
    }


def _confirm(row: Estimate, request: CompileRequest) -> tuple[list[Estimate], Estimate]:
    """Compile a candidate whole, with a smaller batch as long as it does not fit.

    Returns:
        The figures of each batch that was compiled, and the candidate with those of the largest that fits.
    """
    extrapolated = {
        key: getattr(row, key)
        for key in ("needed_bytes", "temporary_bytes", "step_seconds_lower_bound", "estimated_step_seconds")
        if getattr(row, key) is not None
    }
    tried: list[Estimate] = []
    for batch in reversed(_batches(row.mesh[0], row.largest_batch or 0)):
        asked = request.with_batch(batch)
        cost = compile_step(asked)
        tried.append(
            Estimate(
                name=row.name,
                mesh=row.mesh,
                layout=row.layout,
                shard_over_batch=row.shard_over_batch,
                batch_size=batch,
                compiled=True,
                fits=cost.fits,
                needed_bytes=cost.needed_bytes,
                **{key: getattr(cost, key) for key in ("argument_bytes", *EXTRAPOLATED)},
                collectives={kind: collective.count for kind, collective in cost.collectives.items()},
                **_speed(asked, cost.bound, cost.step_time),
            )
        )
        if cost.fits:
            compared = {"extrapolated": extrapolated} if batch == row.largest_batch else {}
            return tried, tried[-1].model_copy(update={"largest_batch": batch, **compared})
    unknown = dict.fromkeys(("tokens_per_second", "tokens_per_second_upper_bound"))
    return tried, row.model_copy(update={"fits": False, "largest_batch": 0, **unknown})
