"""From `plan`'s entries to questions for the compiler, and from its answers to metrics and the sharding file.

Purpose: what `stages/plan.py` strings together. What an entry leaves out comes from the other sections, so that an
entry with nothing but a topology is the run itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core import gemmas
from stages.core.architecture import Architecture, read_architecture
from stages.core.layouts import make_layout
from stages.core.mesh import MeshShape
from stages.core.params import Fetch, Finetune, Layout, Load, Mesh, Plan, PlanStep, PlanTarget, Tokenize
from stages.core.paths import cache_folder, own_path
from stages.core.planning import Question
from stages.core.registry import REGISTRY, name_of
from stages.core.topology import cpu_devices

if TYPE_CHECKING:
    from stages.core.step_program import StepRequest

# What the tutorial reports for its own run (gemma_7b_en on a TPU v3-8, mesh (1, 8), batch 2 x 128 tokens, rank 4 on
# query and value):
# https://ai.google.dev/gemma/docs/core/distributed_tuning, "163ms/step".
MEASURED = {("gemma_7b_en", "v3:2x2", (1, 8), 2, 128, 4, ("query", "value")): 0.163}


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
        from stages.core.keras_folder import folder_format

        folder = own_path(Path(), "fetch.path", params.fetch.path or "")
        return params.fetch.preset, read_architecture(folder, folder_format(folder))
    name = step.preset or params.fetch.preset
    known = REGISTRY.get(name_of(name))
    if name.startswith("hf://") and (known is None or known.like is None):
        from stages.core import huggingface_preset

        return name, huggingface_preset.architecture(name, cache_folder())
    return name, gemmas.architecture(name, "plan.preset")


def own_config(fetch: Fetch, root: Path) -> Path | None:
    """Return the configuration of the person's own preset, which targets that name none are planned for."""
    return None if fetch.path is None else own_path(root, "fetch.path", fetch.path) / "config.json"


def request_of(
    params: Settings,
    step: PlanStep,
    architecture: Architecture,
    mesh: MeshShape,
    *,
    layout: str | None,
    batch_size: int | None = None,
    path: str | None = None,
) -> StepRequest:
    """Return a step, with the other sections' settings for whatever is None."""
    # Keras chooses its backend when it is first imported: `devices.configure` comes before this.
    from stages.core.step_program import StepRequest

    named = params.layout if layout is None else params.layout.model_copy(update={"name": layout, "rules": None})
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


def question_of(params: Settings, target: PlanTarget) -> tuple[str, Question]:
    """Return a target as a question, under its preset's name."""
    name, architecture = architecture_of(params, target)
    mesh = MeshShape(tuple(target.mesh or params.mesh.shape))
    request = request_of(
        params, target, architecture, mesh, layout=target.layout, batch_size=target.batch_size, path=target.step
    )
    return name, Question(request, target.topology)


def simulated_devices(params: Settings) -> int:
    """Return how many CPU devices the targets need: as many as the largest `cpu:N`, else one."""
    plan = params.plan
    names = [target.topology for target in plan.targets]
    names += [plan.search.topology] if plan.search else []
    names += plan.scaling.topologies if plan.scaling else []
    return max([1, *(cpu_devices(name) or 1 for name in names)])


def label(name: str, question: Question) -> str:
    """Return what a target is called: all that tells it from another."""
    request = question.request
    shape = "x".join(str(size) for size in request.mesh.shape)
    settings = request.settings
    parts = [
        name,
        question.topology,
        f"mesh {shape}",
        request.layout.name,
        request.dtype,
        f"{settings.batch_size}x{request.length}",
        f"rank {settings.rank} on {', '.join(settings.targets)}" if settings.rank else "full",
    ]
    parts += ["rematerialize"] if settings.rematerialize else []
    parts += ["tutorial's step"] if request.path == "tutorial" else []
    return ", ".join(parts)


def entry(name: str, question: Question, answer: dict[str, Any]) -> dict[str, Any]:
    """Return a target's entry in `plan.json`: what was asked, and what the compiler says for each device."""
    request = question.request
    settings = request.settings
    key = (
        name, question.topology, request.mesh.shape, settings.batch_size, request.length, settings.rank,
        tuple(settings.targets),
    )  # fmt: skip
    collectives = {
        kind: {"count": each["count"], "bytes": each["bytes"]} for kind, each in answer.get("collectives", {}).items()
    }
    found = {
        "preset": name,
        "topology": question.topology,
        "devices": answer["devices"],
        "mesh": list(request.mesh.shape),
        "layout": request.layout.name,
        "dtype": request.dtype,
        "batch_size": settings.batch_size,
        "length": request.length,
        "rank": settings.rank,
        "rematerialize": settings.rematerialize,
        "step": request.path,
        "parameters": answer["parameters"],
        "trainable_parameters": answer["trainable_parameters"],
        "fits": answer["fits"],
        "argument_bytes_per_device": answer.get("argument_bytes"),
        **{f"{kind}_bytes_per_device": size for kind, size in answer["by_kind"].items()},
        "temporary_bytes_per_device": answer.get("temporary_bytes"),
        "output_bytes_per_device": answer.get("output_bytes"),
        "aliased_bytes_per_device": answer.get("aliased_bytes"),
        "needed_bytes_per_device": answer.get("needed_bytes", answer.get("asked_bytes")),
        "hbm_bytes_per_device": answer["memory_bytes"],
        "flops_per_step": answer.get("flops"),
        "moved_bytes_per_step": answer.get("moved_bytes"),
        "collectives": collectives,
        "collective_bytes_per_step": sum(each["bytes"] for each in collectives.values()),
        # What goes over the wire tells more: an all-reduce sends its bytes twice, a reduce-scatter once.
        "wire_bytes_per_step": answer.get("wire_bytes"),
        "least_step_seconds": answer.get("least_seconds"),
        "least_step_limit": answer.get("least_limit"),
        "measured_step_seconds": MEASURED.get(key) if request.path == "ours" else None,
        "compile_seconds": answer["compile_seconds"],
    }
    return {key: value for key, value in found.items() if value is not None}


def details(name: str, question: Question, answer: dict[str, Any]) -> dict[str, Any]:
    """Return what `data/sharding/plan.json` holds of a target: the weights' table and the buffers beside the sums.

    The compilation's time is left out: the file's bytes follow from the settings alone.
    """
    found = {key: value for key, value in entry(name, question, answer).items() if key != "compile_seconds"}
    fallbacks = [vars(fallback) for fallback in question.request.layout.fallbacks]
    least = {f"least_{cause}_seconds": seconds for cause, seconds in (answer.get("least") or {}).items()}
    return {
        **found,
        **least,
        "largest": answer.get("largest", []),
        "fallbacks": fallbacks,
        "weights": answer["weights"],
    }
