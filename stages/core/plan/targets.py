"""From the entries of params `plan` to compile requests, and from their results to records.

What an entry leaves out comes from the other sections, so an entry with only a topology is the run itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stages.core.common.errors import ParamsError
from stages.core.common.paths import cache_folder, own_path
from stages.core.config.plan import Plan, PlanStep, PlanTarget
from stages.core.config.schema import Fetch, Finetune, Layout, Load, Mesh, Tokenize
from stages.core.config.section import Rule
from stages.core.fetch import catalog, huggingface
from stages.core.fetch.catalog import REGISTRY, name_of
from stages.core.fetch.local import folder_format
from stages.core.plan.chips import CHIPS
from stages.core.plan.compilation import CompileRequest, StepCost
from stages.core.plan.step_program import StepRequest
from stages.core.plan.topology import cpu_devices, describe
from stages.core.presets.architecture import Architecture
from stages.core.presets.formats import format_of
from stages.core.records.layout import OverBatch
from stages.core.records.plan import RunKey, Target, rules_of
from stages.core.sharding.mesh import MeshShape
from stages.core.sharding.named_layouts import make_layout

# What is split over the batch axis too, in labels.
OVER_BATCH = {"optimizer": "optimizer over batch", "weights": "weights over batch"}


@dataclass(frozen=True)
class Settings:
    """The sections that a plan reads: its own, and those that fill what its entries leave out."""

    fetch: Fetch
    tokenize: Tokenize
    mesh: Mesh
    layout: Layout
    load: Load
    finetune: Finetune
    plan: Plan


def architecture_of(params: Settings, step: PlanStep) -> tuple[str, Architecture]:
    """Return name and architecture of the preset to plan for; nothing but its configuration is read.

    Raises:
        ParamsError: no public Gemma of this name.
        StageError: `fetch.path` holds no preset, or Hugging Face does not give the configuration of one.
    """
    if step.preset is None and params.fetch.source == "path":
        folder = own_path(Path(), "fetch.path", params.fetch.path or "")
        return params.fetch.preset, format_of(folder_format(folder)).read_architecture(folder)
    name = step.preset or params.fetch.preset
    if name.startswith("hf://") and name_of(name) not in REGISTRY:
        return name, huggingface.architecture(name, cache_folder())
    return name, catalog.architecture(name, "plan.preset")


def check(params: Settings) -> None:
    """Check the names of all entries before the first of their programs is compiled, which takes minutes.

    Raises:
        ParamsError: no public Gemma of the name of a preset.
        StageError: no such topology, or no compiler for it.
    """
    plan = params.plan
    others = [each for each in (plan.search, plan.scaling) if each]
    for step in [*plan.targets, *others]:
        architecture_of(params, step)
    names = [each.topology for each in plan.targets]
    names += [plan.search.topology] if plan.search else []
    names += plan.scaling.topologies if plan.scaling else []
    for name in names:
        describe(name)


def own_config(fetch: Fetch, root: Path) -> Path | None:
    """Return the configuration of the user's own preset, which targets that name none are planned for."""
    return None if fetch.path is None else own_path(root, "fetch.path", fetch.path) / "config.json"


def step_of(
    params: Settings,
    step: PlanStep,
    architecture: Architecture,
    mesh: MeshShape,
    *,
    layout: str | None,
    rules: list[Rule] | None = None,
    shard_over_batch: OverBatch | None = None,
    batch_size: int | None = None,
    path: str | None = None,
) -> StepRequest:
    """Return a step, with the other sections' settings for whatever is None."""
    named = params.layout if layout is None else params.layout.model_copy(update={"name": layout, "rules": rules})
    if shard_over_batch is not None:
        named = named.model_copy(update={"shard_over_batch": shard_over_batch})
    changes = {
        "rank": step.rank,
        "targets": step.lora_targets,
        "batch_size": batch_size,
        "rematerialize": step.rematerialize,
    }
    settings = params.finetune.model_copy(update={key: value for key, value in changes.items() if value is not None})
    return StepRequest(
        architecture,
        mesh,
        make_layout(named, architecture, mesh),
        step.dtype or params.load.dtype,
        settings,
        step.length or params.tokenize.length,
        path or "ours",
    )


def compile_request_of(params: Settings, target: PlanTarget) -> tuple[str, CompileRequest]:
    """Return a target's preset by name, and what to compile for it."""
    name, architecture = architecture_of(params, target)
    mesh = MeshShape(tuple(target.mesh or params.mesh.shape))
    step = step_of(
        params,
        target,
        architecture,
        mesh,
        layout=target.layout,
        rules=target.rules,
        shard_over_batch=target.shard_over_batch,
        batch_size=target.batch_size,
        path=target.step,
    )
    return name, CompileRequest(step, target.topology)


def prices(plan: Plan) -> Mapping[str, float]:
    """Return what an hour of each chip costs.

    Raises:
        ParamsError: a chip that no topology is of.
    """
    found = plan.price_per_chip_hour or {}
    for chip in found:
        if chip not in CHIPS:
            raise ParamsError(
                f"plan.price_per_chip_hour must name chips of topologies: {', '.join(CHIPS)}. Received: {chip}"
            )
    return found


def simulated_devices(params: Settings) -> int:
    """Return how many CPU devices the targets need: as many as the largest `cpu:N`, else one."""
    plan = params.plan
    names = [target.topology for target in plan.targets]
    names += [plan.search.topology] if plan.search else []
    names += plan.scaling.topologies if plan.scaling else []
    return max([1, *(cpu_devices(name) or 1 for name in names)])


def run_key(name: str, step: StepRequest) -> RunKey:
    """Return what distinguishes a step of a preset from others."""
    return RunKey(
        preset=name,
        mesh=list(step.mesh.shape),
        layout=step.layout.name,
        rules=rules_of(step.layout),
        shard_over_batch=step.layout.shard_over_batch,
        dtype=step.dtype,
        length=step.length,
        step=step.path,
        **step.settings.step_key,
    )


def label(target: Target) -> str:
    """Return what a target is called: everything that distinguishes it from another."""
    parts = [
        f"{target.preset}",
        target.topology,
        f"mesh {'x'.join(str(size) for size in target.mesh or [])}",
        f"{target.layout}",
        f"{target.dtype}",
        f"{target.batch_size}x{target.length}",
        f"rank {target.rank} on {', '.join(target.lora_targets or [])}" if target.rank else "full",
    ]
    parts += [OVER_BATCH[target.shard_over_batch]] if target.shard_over_batch != "none" else []
    parts += ["rematerialize"] if target.rematerialize else []
    parts += ["tutorial's step"] if target.step == "tutorial" else []
    if target.rules:
        # Two sets of rules have the same name; what is behind it tells them apart.
        parts[3] += f" {hashlib.sha256(json.dumps(target.rules).encode()).hexdigest()[:6]}"
    return ", ".join(parts)


def target_of(name: str, request: CompileRequest, cost: StepCost, price: float | None = None) -> Target:
    """Return the record of a target: what was asked, what the compiler says, and what an hour of its chips costs."""
    step = request.step
    key = run_key(name, step)
    bound, expected = cost.bound, cost.estimated_seconds
    return Target(
        **key.model_dump(),
        topology=request.topology,
        device_kind=cost.device_kind,
        devices=cost.devices,
        chips=cost.chips,
        parameters=cost.parameters,
        trainable_parameters=cost.trainable_parameters,
        fits=cost.fits,
        argument_bytes_per_device=cost.argument_bytes,
        **{f"{kind}_bytes_per_device": size for kind, size in cost.by_kind.items()},
        temporary_bytes_per_device=cost.temporary_bytes,
        output_bytes_per_device=cost.output_bytes,
        aliased_bytes_per_device=cost.aliased_bytes,
        needed_bytes_per_device=cost.needed_bytes,
        hbm_bytes_per_device=cost.memory_bytes,
        flops_per_step=cost.flops,
        hbm_traffic_bytes_per_step=cost.hbm_traffic_bytes,
        collectives=cost.collectives,
        collective_bytes_per_step=sum(collective.bytes for collective in cost.collectives.values()),
        # What is sent says more: an all-reduce sends its bytes twice, a reduce-scatter once.
        interconnect_bytes_per_step=cost.interconnect_bytes,
        step_seconds_lower_bound=bound.seconds if bound else None,
        bound_by=bound.bound_by if bound else None,
        compute_seconds=bound.compute if bound else None,
        memory_seconds=bound.memory if bound else None,
        network_seconds=bound.network if bound else None,
        estimated_step_seconds=expected,
        step_time=cost.step_time,
        share_of_peak=bound.compute / expected if bound and expected else None,
        price_per_chip_hour=price,
        compile_seconds=cost.compile_seconds,
        largest=cost.largest,
        fallbacks=list(step.layout.fallbacks),
        weights=[row.model_dump() for row in cost.weights],
    )
