"""The files that the report is made from; what is missing is listed, not an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from stages.core.common.errors import StageError
from stages.core.common.paths import CURVE, MANIFEST, PLAN, SAMPLES, SHARDING, Paths, generated, maker_of, metrics
from stages.core.records.evaluate import CompareMetrics, EvaluateMetrics
from stages.core.records.finetune import FinetuneMetrics, Sample, Step, read_curve
from stages.core.records.generate import GenerateMetrics, Generation
from stages.core.records.load import LoadMetrics
from stages.core.records.manifest import Manifest
from stages.core.records.plan import PlanFile
from stages.core.records.prepare import PrepareMetrics
from stages.core.records.record import FileRecord
from stages.core.records.sharding import Sharding
from stages.core.records.tokenize import TokenizeMetrics

# The pipeline's own; what is shown as before and after.
VARIANTS = ("baseline", "tuned")
Content = TypeVar("Content")


@dataclass(frozen=True)
class Inputs:
    """Everything the report shows; `missing` has for each absent file the command that writes it.

    What two stages or all variants write is keyed by variant, and has those that are there. `variants` names all that
    there should be.
    """

    variants: tuple[str, ...]
    manifest: Manifest
    sharding: dict[str, Sharding]
    prepare: PrepareMetrics | None
    tokenize: TokenizeMetrics | None
    load: LoadMetrics | None
    finetune: FinetuneMetrics | None
    generate: dict[str, GenerateMetrics]
    evaluate: dict[str, EvaluateMetrics]
    compare: CompareMetrics | None
    curve: list[Step] | None
    generations: dict[str, list[Generation]]
    samples: list[Sample]
    plan: PlanFile | None
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, FileRecord | None]:
        """Every metrics file by its name, None where it is not there."""
        return {
            **{name: getattr(self, name) for name in ("prepare", "tokenize", "load", "finetune")},
            **{f"generate/{variant}": self.generate.get(variant) for variant in self.variants},
            **{f"evaluate/{variant}": self.evaluate.get(variant) for variant in self.variants},
            "compare": self.compare,
        }


def read_inputs(paths: Paths, others: Iterable[str] = ()) -> Inputs:
    """Read every output of the pipeline.

    Args:
        paths: of inputs and outputs.
        others: variants beyond the pipeline's own.

    Raises:
        StageError: the manifest or the baseline's sharding is not there, or a file does not have its form.
    """
    missing: dict[str, str] = {}
    every = (*VARIANTS, *others)

    def optional(relative: str, read: Callable[[Paths, str], Content]) -> Content | None:
        try:
            paths.read(relative)
        except StageError:
            missing[relative] = maker_of(relative)
            return None
        return read(paths, relative)

    def by_variant(relative: Callable[[str], str], read: Callable[[Paths, str], Content]) -> dict[str, Content]:
        found = {variant: optional(relative(variant), read) for variant in every}
        return {variant: content for variant, content in found.items() if content is not None}

    manifest = Manifest.read(paths, MANIFEST)
    sharding = {"baseline": Sharding.read(paths, SHARDING["baseline"])}
    if tuned := optional(SHARDING["tuned"], Sharding.read):
        sharding["tuned"] = tuned
    return Inputs(
        variants=every,
        manifest=manifest,
        sharding=sharding,
        prepare=optional(metrics("prepare"), PrepareMetrics.read),
        tokenize=optional(metrics("tokenize"), TokenizeMetrics.read),
        load=optional(metrics("load"), LoadMetrics.read),
        finetune=optional(metrics("finetune"), FinetuneMetrics.read),
        generate=by_variant(lambda variant: metrics(f"generate/{variant}"), GenerateMetrics.read),
        evaluate=by_variant(lambda variant: metrics(f"evaluate/{variant}"), EvaluateMetrics.read),
        compare=optional(metrics("compare"), CompareMetrics.read),
        curve=optional(CURVE, read_curve),
        generations=by_variant(generated, Generation.read_lines),
        samples=optional(SAMPLES, Sample.read_lines) or [],
        plan=optional(PLAN, PlanFile.read),
        missing=missing,
    )
