"""The settings: what each section of `params.yaml` may hold.

The schema has no defaults: `params.yaml` is complete, so DVC tracks every setting.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stages.core.config.plan import Plan, PlanScaling, PlanSearch, PlanTarget
from stages.core.config.section import (
    DISPLAY,
    IN_FLOATS,
    IN_FULL,
    IN_FULL_DTYPES,
    RUN,
    BatchSize,
    Dtype,
    Length,
    Positive,
    Rule,
    Section,
    Seed,
)
from stages.core.config.variants import PIPELINES_OWN, Variants
from stages.core.records.forms import FORMS
from stages.core.records.layout import LoraConfig, MeshShape, OverBatch


class Fetch(Section):
    """Where the preset comes from."""

    source: Literal["pypi", "kaggle", "huggingface", "path"]
    preset: Annotated[str, Field(min_length=1)]
    path: str | None

    @model_validator(mode="after")
    def _path_goes_with_its_source(self) -> Fetch:
        if (self.source == "path") != (self.path is not None):
            raise ValueError("path must be given with source: path and be null otherwise")
        if self.source == "pypi" and self.preset != "gemma3_270m":
            raise ValueError(
                "preset must be gemma3_270m with source: pypi (other presets: source kaggle, huggingface or path)"
            )
        return self


class Prepare(Section):
    """Which reviews, and how they are cleaned and split."""

    source: Literal["imdb_sample", "imdb_reviews", "files"]
    validation: Positive
    take: Positive | None
    shuffle: bool
    seed: Seed
    html_breaks: Literal["auto", "newline", "space", "keep"]
    min_characters: Positive | None
    duplicates: Literal["drop", "keep"]
    data_dir: str | None
    train_file: str | Annotated[list[str], Field(min_length=1)] | None
    validation_file: str | Annotated[list[str], Field(min_length=1)] | None
    format: Literal["columns", "alpaca", "dolly", "sharegpt", "messages"]
    text_column: Annotated[str, Field(min_length=1)]
    prompt_column: Annotated[str, Field(min_length=1)] | None
    response_column: Annotated[str, Field(min_length=1)] | None
    label_column: str | None

    @model_validator(mode="after")
    def _train_file_goes_with_files(self) -> Prepare:
        if (self.source == "files") != (self.train_file is not None):
            raise ValueError("train_file must be given with source: files and be null otherwise")
        if self.source != "files" and self.validation_file is not None:
            raise ValueError("validation_file must be null unless source is files")
        if self.source != "imdb_reviews" and self.data_dir is not None:
            raise ValueError("data_dir must be null unless source is imdb_reviews")
        if (self.prompt_column is None) != (self.response_column is None):
            raise ValueError("prompt_column and response_column must be given together or both be null")
        if self.format != "columns" and (self.source != "files" or self.prompt_column is not None):
            raise ValueError("format must be columns unless source is files and prompt_column null")
        if self.prompt_column is not None and self.source != "files":
            raise ValueError("prompt_column must be null unless source is files")
        if self.label_column is not None and self.source != "files":
            raise ValueError("label_column must be null unless source is files")
        if self.prompt_column is not None and self.prompt_column == self.response_column:
            raise ValueError("prompt_column and response_column must name two columns")
        return self


class Tokenize(Section):
    """How reviews become sequences of tokens."""

    length: Length
    packing: bool
    eos: Literal["end", "always", "never"]
    control_tokens: Literal["text", "tokens"]


class Mesh(Section):
    """The device mesh: axes batch and model."""

    shape: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    devices: Literal["auto", "simulated", "real"]
    launcher: Annotated[Annotated[str, Field(min_length=1)] | None, DISPLAY]
    join_timeout: Annotated[Positive, DISPLAY]

    @model_validator(mode="after")
    def _at_most_4096_devices(self) -> Mesh:
        if self.shape[0] * self.shape[1] > 4096:
            raise ValueError("shape must multiply to at most 4096 devices")
        return self

    def as_shape(self) -> MeshShape:
        """Return the mesh as it is passed on."""
        return MeshShape(tuple(self.shape), device_kind=self.devices)


class Layout(Section):
    """How weights are laid over the mesh."""

    name: Literal["auto", "tutorial", "rules"]
    rules: Annotated[list[Rule], Field(min_length=1)] | None
    shard_over_batch: OverBatch
    max_replicated_fraction: Annotated[float, Field(ge=0.0, le=1.0)]

    @model_validator(mode="after")
    def _rules_go_with_their_name(self) -> Layout:
        if (self.name == "rules") != (self.rules is not None):
            raise ValueError("rules must be given with name: rules and be null otherwise")
        return self


class Load(Section):
    """The dtype the model is held and run in."""

    dtype: Dtype


class Quantize(Section):
    """How the codes of an int4 base are chosen."""

    sequences: Annotated[int, Field(ge=1, le=4096)] | None


class Finetune(Section):
    """The training run.

    The bounds of real numbers are those beyond which float32 overflows or rounds to nothing, or no run can learn.
    """

    start_from: Annotated[Annotated[str, Field(min_length=1)] | None, RUN]
    rank: Annotated[int, Field(ge=0, le=512)]
    alpha: Annotated[float, Field(gt=0, le=1e4)] | None
    targets: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    epochs: Annotated[Positive, RUN]
    steps: Annotated[Positive | None, RUN]
    batch_size: BatchSize
    gradient_accumulation: BatchSize
    learning_rate: Annotated[float, Field(gt=0, le=1), RUN]
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)]
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    beta_1: Annotated[float, Field(ge=0, le=0.9999), RUN]
    beta_2: Annotated[float, Field(ge=0, le=0.99999), RUN]
    epsilon: Annotated[float, Field(gt=0, le=1), RUN]
    clip_norm: Annotated[float, Field(gt=0, le=1e12)] | None
    rematerialize: bool
    validate_every: Annotated[Positive | None, RUN]
    validate_sequences: Annotated[Positive | None, RUN]
    early_stopping: Annotated[Positive | None, RUN]
    sample_every: Annotated[Positive | None, DISPLAY]
    sample_prompt: Annotated[str, Field(min_length=1), DISPLAY]
    sample_tokens: Annotated[int, Field(ge=1, le=8192), DISPLAY]
    checkpoint_every: Annotated[Positive | None, DISPLAY]
    checkpoint_keep: Annotated[Positive, DISPLAY]
    seed: Annotated[Seed, RUN]

    @model_validator(mode="after")
    def _settings_agree(self) -> Finetune:
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("targets must name each layer once")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ValueError(f"targets must be names or regular expressions; {target!r} is not: {error}") from error
        for name in ("learning_rate", "clip_norm", "epsilon"):
            if (value := getattr(self, name)) is not None and value < 1e-12:
                raise ValueError(f"{name} must be at least 1.0e-12")
        if self.rank == 0 and self.lora_dropout:
            raise ValueError("lora_dropout must be 0.0 with rank: 0, which has no adapter")
        if self.rank == 0 and self.start_from is not None:
            raise ValueError("start_from must be null with rank: 0, which trains every weight")
        if self.rank == 0 and self.alpha is not None:
            raise ValueError("alpha must be null with rank: 0, which has no adapter")
        return self

    @property
    def lora(self) -> LoraConfig:
        """What is trained, as it is passed on."""
        return LoraConfig(self.rank, self.alpha, tuple(self.targets))

    @property
    def step_key(self) -> dict[str, Any]:
        """What distinguishes the train step of these settings from another, as fields of `RunKey`."""
        return {
            "batch_size": self.batch_size,
            "rank": self.rank,
            "lora_targets": list(self.lora.targets) or None,
            "rematerialize": self.rematerialize,
        }


class Generate(Section):
    """The prompts and how they are continued."""

    prompts: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    chat_template: bool
    thinking: bool
    system: Annotated[str, Field(min_length=1)] | None
    max_tokens: Annotated[int, Field(ge=1, le=8192)]
    temperature: Annotated[float, Field(ge=0, le=10)]
    top_k: Positive | None
    top_p: Annotated[float, Field(gt=0, le=1)] | None
    min_p: Annotated[float, Field(ge=0, le=1)] | None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)]
    samples: Annotated[int, Field(ge=1, le=1024)]
    stop_strings: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None
    seed: Seed

    @model_validator(mode="after")
    def _turns_are_of_the_template(self) -> Generate:
        for name, wanted in (("thinking", self.thinking), ("system", self.system)):
            if wanted and not self.chat_template:
                raise ValueError(f"{name} needs chat_template: true, of which it is a part")
        return self

    @model_validator(mode="after")
    def _logits_over_temperature_are_finite(self) -> Generate:
        if 0 < self.temperature < 0.01:
            raise ValueError("temperature must be 0.0 (the likeliest token) or at least 0.01")
        return self


class Evaluate(Section):
    """How the held-out loss is measured, and what else."""

    tasks: (
        Annotated[list[Annotated[str, Field(pattern="^(sentiment|float_base|lm_eval:.+)$")]], Field(min_length=1)]
        | None
    )
    task_limit: Positive | None
    max_length: Length
    batch_tokens: Annotated[int, Field(ge=1, le=2**24)]


class Export(Section):
    """The forms in which the tuned model is written for others."""

    formats: Annotated[list[Literal["peft", "huggingface", "keras", "gguf"]], Field(min_length=1)]
    base: Literal["text", "vision"]
    dtype: Literal["float32", "bfloat16"]
    gguf_type: Literal["F32", "F16", "BF16", "Q8_0"]

    @model_validator(mode="after")
    def _each_format_once(self) -> Export:
        if len(set(self.formats)) != len(self.formats):
            raise ValueError("formats must name each format once")
        return self


class Params(Section):
    """All sections of `params.yaml`."""

    fetch: Fetch
    prepare: Prepare
    tokenize: Tokenize
    mesh: Mesh
    layout: Layout
    quantize: Quantize
    load: Load
    finetune: Finetune
    variants: Variants
    generate: Generate
    evaluate: Evaluate
    export: Export
    plan: Plan

    @property
    def every_variant(self) -> tuple[str, ...]:
        """Names of the variants: the pipeline's own, then those of `variants`."""
        return (*PIPELINES_OWN, *self.variants)

    @model_validator(mode="after")
    def _dtypes_fit_their_use(self) -> Params:
        if self.finetune.rank == 0 and self.load.dtype not in IN_FULL_DTYPES:
            raise ValueError(f"load.dtype {IN_FULL} (finetune.rank: 0)")
        if "float_base" in (self.evaluate.tasks or ()) and self.load.dtype not in FORMS:
            raise ValueError("evaluate.tasks may name float_base only where load.dtype is one of int8 or int4")
        if self.load.dtype in FORMS and self.layout.shard_over_batch == "weights":
            raise ValueError(f"layout.shard_over_batch: weights {IN_FLOATS}, not {self.load.dtype}")
        steps: dict[str, PlanTarget | PlanSearch | PlanScaling | None]
        steps = {f"targets.{i}": target for i, target in enumerate(self.plan.targets)}
        steps |= {"search": self.plan.search, "scaling": self.plan.scaling}
        for name, step in steps.items():
            if step is None:
                continue
            rank = self.finetune.rank if step.rank is None else step.rank
            dtype = step.dtype or self.load.dtype
            if rank == 0 and dtype not in IN_FULL_DTYPES:
                raise ValueError(f"dtype in plan.{name} {IN_FULL} (rank: 0)")
            over_batch = step.shard_over_batch or self.layout.shard_over_batch
            if dtype in FORMS and "weights" in over_batch:
                raise ValueError(f"shard_over_batch: weights in plan.{name} {IN_FLOATS}, not {dtype}")
            if isinstance(step, PlanTarget) and step.step == "tutorial" and dtype in FORMS:
                raise ValueError(f"dtype in plan.{name} must be one of Keras' own with step: tutorial, not {dtype}")
        return self
