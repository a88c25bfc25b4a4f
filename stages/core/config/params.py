"""The settings: what each section of `params.yaml` may hold, and reading it with errors that name the line.

Purpose: stop before any work on a wrong key, type or range. The schema has no defaults: every key stands in
`params.yaml`, so what DVC tracks is all there is.
Reads: `params.yaml`.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stages.core.common.errors import ParamsError, shown

# Far more than there are settings: an alias in YAML can make a short text a list without end.
MOST_VALUES = 10_000

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
# No run counts further; beyond, integers of JAX and numpy overflow.
Positive = Annotated[int, Field(ge=1, le=10**9)]
BatchSize = Annotated[int, Field(ge=1, le=65536)]
Dtype = Literal["float32", "bfloat16", "mixed_bfloat16"]

# AdamW works in the dtype of what it trains. Bfloat16 has 8 bits: 0.999 is 1.0 there, so that every step is exactly 0.
NOT_IN_FULL = "bfloat16"
IN_FULL = "must be mixed_bfloat16 (float32 weights, bfloat16 arithmetic) or float32 where every weight is trained"

# What a setting has no influence on. DISPLAY: any result of the run (what is printed, how often a checkpoint is kept);
# dvc.yaml does not list it. RUN: the compiled train step (how long the run is, the size of a step); `plan` does not
# depend on it.
DISPLAY = Field(json_schema_extra={"changes": "display"})
RUN = Field(json_schema_extra={"changes": "run"})


class Section(BaseModel):
    """A section: no unknown key, no silent conversion, no change after reading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


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
    """How reviews become windows of tokens."""

    length: Annotated[int, Field(ge=8, le=8192)]
    packing: bool
    eos: Literal["end", "always", "never"]
    control_tokens: Literal["text", "tokens"]


class Mesh(Section):
    """The device mesh: axes batch and model."""

    shape: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    devices: Literal["auto", "simulated", "real"]

    @model_validator(mode="after")
    def _at_most_4096_devices(self) -> Mesh:
        if self.shape[0] * self.shape[1] > 4096:
            raise ValueError("shape must multiply to at most 4096 devices")
        return self


class Rule(Section):
    """A layout rule: a pattern over weight paths, and an axis (or several, or null) for each dimension."""

    pattern: Annotated[str, Field(min_length=1)]
    spec: list[str | list[str] | None]


class Layout(Section):
    """How weights are laid over the mesh."""

    name: Literal["auto", "tutorial", "rules"]
    rules: Annotated[list[Rule], Field(min_length=1)] | None
    max_replicated_fraction: Annotated[float, Field(ge=0.0, le=1.0)]

    @model_validator(mode="after")
    def _rules_go_with_their_name(self) -> Layout:
        if (self.name == "rules") != (self.rules is not None):
            raise ValueError("rules must be given with name: rules and be null otherwise")
        return self


class Load(Section):
    """The dtype the model is held and run in."""

    dtype: Dtype


class Finetune(Section):
    """The training run.

    The bounds of real numbers are those beyond which float32 overflows or rounds to nothing, or no run can learn.
    """

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
        if self.rank == 0 and self.alpha is not None:
            raise ValueError("alpha must be null with rank: 0, which has no adapter")
        return self


class Generate(Section):
    """The prompts and how they are continued."""

    prompts: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    turns: bool
    max_tokens: Annotated[int, Field(ge=1, le=8192)]
    temperature: Annotated[float, Field(ge=0, le=10)]
    top_k: Positive | None
    seed: Seed

    @model_validator(mode="after")
    def _logits_over_temperature_are_finite(self) -> Generate:
        if 0 < self.temperature < 0.01:
            raise ValueError("temperature must be 0.0 (the likeliest token) or at least 0.01")
        return self


class Evaluate(Section):
    """How the held-out loss is measured."""

    max_length: Annotated[int, Field(ge=8, le=131072)]
    batch_tokens: Annotated[int, Field(ge=1, le=2**24)]


MeshList = Annotated[list[Positive], Field(min_length=2, max_length=2)]
TopologyName = Annotated[str, Field(pattern=r"^[a-z0-9]+:[0-9x]+$")]


class PlanStep(Section):
    """A train step to plan for; what it leaves out (null) is as in the other sections."""

    preset: Annotated[str, Field(min_length=1)] | None = None
    dtype: Dtype | None = None
    length: Annotated[int, Field(ge=8, le=8192)] | None = None
    rank: Annotated[int, Field(ge=0, le=512)] | None = None
    lora_targets: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    rematerialize: bool | None = None


class PlanTarget(PlanStep):
    """A step on a mesh of a topology's devices."""

    topology: TopologyName
    mesh: MeshList | None = None
    layout: Literal["auto", "tutorial"] | None = None
    batch_size: BatchSize | None = None
    step: Literal["ours", "tutorial"] | None = None


class PlanSearch(PlanStep):
    """Meshes, layouts and batches to try on a topology."""

    topology: TopologyName
    meshes: Annotated[list[MeshList], Field(min_length=1)] | None = None
    layouts: Annotated[list[Literal["auto", "tutorial"]], Field(min_length=1)] | None = None
    largest_batch: BatchSize | None = None


class PlanScaling(PlanStep):
    """One step on more and more chips: the batch axis grows, and the batch with it."""

    topologies: Annotated[list[TopologyName], Field(min_length=1)]
    model_axis: Positive | None = None
    batch_per_row: BatchSize | None = None
    layout: Literal["auto", "tutorial"] | None = None


class Plan(Section):
    """What the TPU compiler is asked."""

    targets: list[PlanTarget]
    search: PlanSearch | None
    scaling: PlanScaling | None


class Params(Section):
    """All sections of `params.yaml`."""

    fetch: Fetch
    prepare: Prepare
    tokenize: Tokenize
    mesh: Mesh
    layout: Layout
    load: Load
    finetune: Finetune
    generate: Generate
    evaluate: Evaluate
    plan: Plan

    @model_validator(mode="after")
    def _what_is_trained_in_full_can_learn(self) -> Params:
        if self.finetune.rank == 0 and self.load.dtype == NOT_IN_FULL:
            raise ValueError(f"load.dtype {IN_FULL} (finetune.rank: 0)")
        steps: dict[str, PlanStep | None] = {f"targets.{i}": target for i, target in enumerate(self.plan.targets)}
        for name, step in {**steps, "search": self.plan.search, "scaling": self.plan.scaling}.items():
            if step is None:
                continue
            rank = self.finetune.rank if step.rank is None else step.rank
            if rank == 0 and (step.dtype or self.load.dtype) == NOT_IN_FULL:
                raise ValueError(f"dtype in plan.{name} {IN_FULL} (rank: 0)")
        return self


def without(settings: Section, *changes: str) -> dict[str, Any]:
    """Return a section's settings as plain values, without those marked as changing only `display` or `run`."""
    marked = {
        name
        for name, field in type(settings).model_fields.items()
        if (field.json_schema_extra or {}).get("changes") in changes
    }
    return settings.model_dump(exclude=marked)


def read_params(path: Path, overrides: tuple[str, ...] = ()) -> Params:
    """Read and check the whole of `params.yaml`.

    Args:
        path: the YAML file.
        overrides: `section.key=value` strings, the value in YAML; they win over the file.

    Raises:
        ParamsError: one line for each mistake: key, what is allowed, the value received, and the line in the file.
    """
    return check_params(read_text(path), path.name, overrides)


def read_text(path: Path) -> str:
    """Return the text of `params.yaml`.

    Raises:
        ParamsError: no such file, or no UTF-8.
    """
    if not path.is_file():
        raise ParamsError(
            f"The settings file does not exist. Received: path={path}. Run this in the repository's folder."
        )
    try:
        # Line endings as they are: what rewrites the file must not change them.
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path.name} must be UTF-8 text: {error}") from error


def parse(text: str, file_name: str) -> dict:
    """Return the sections of `params.yaml`, with ruamel's containers that know their lines; nothing in them is checked.

    Raises:
        ParamsError: not YAML, or no sections.
    """
    from ruamel.yaml import YAML

    content = _load(YAML(), text, f"{file_name} is not valid YAML")
    if not isinstance(content, dict):
        raise ParamsError(f"{file_name} must hold sections such as `finetune:`. Received: {type(content).__name__}")
    return content


def check_params(text: str, file_name: str, overrides: tuple[str, ...] = ()) -> Params:
    """Check the text of `params.yaml`; arguments and errors as for `read_params`."""
    content = parse(text, file_name)
    overridden = set()
    for override in overrides:
        overridden.add(apply_override(content, override))
    try:
        return Params.model_validate(plain(content))
    except ValidationError as error:
        lines = [_describe(problem, content, file_name, overridden) for problem in error.errors()]
        raise ParamsError("\n".join(dict.fromkeys(lines))) from error


def apply_override(content: dict, override: str) -> tuple[str, ...]:
    """Set one `section.key=value` in place and return its key as a tuple."""
    from ruamel.yaml import YAML

    name, equals, text = override.partition("=")
    keys = tuple(name.split("."))
    if not equals or not all(keys):
        raise ParamsError(f"--set takes section.key=value. Received: --set {override}")
    value = _load(YAML(typ="safe", pure=True), text, f"--set takes a YAML value. Received: --set {shown(override)}")
    target = content
    for depth, key in enumerate(keys[:-1]):
        if not isinstance(target.get(key) if isinstance(target, dict) else None, dict):
            raise ParamsError(
                f"--set: {'.'.join(keys[: depth + 1])} is not a section of the settings.{_nearest(key, target)}"
            )
        target = target[key]
    if keys[-1] not in target:
        raise ParamsError(f"--set: {name} is not a key of the settings.{_nearest(keys[-1], target)}")
    target[keys[-1]] = value
    return keys


def plain(node: Any) -> Any:
    """Return ruamel's round-trip containers and scalars as plain Python ones.

    Raises:
        ParamsError: more than `MOST_VALUES`, as of a list that is in itself, or nested too deeply.
    """
    left = MOST_VALUES

    def copied(node: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ParamsError(
                f"The settings must have at most {MOST_VALUES:,} values. Received: more, or a list in itself"
            )
        if isinstance(node, dict):
            return {str(key): copied(value) for key, value in node.items()}
        if isinstance(node, list):
            return [copied(value) for value in node]
        for kind in (bool, int, float, str):
            if isinstance(node, kind):
                return kind(node)
        return node

    try:
        return copied(node)
    except RecursionError as error:
        raise ParamsError("The settings must not be nested so deeply. Received: a list or section in itself") from error


def _load(yaml: Any, text: str, wrong: str) -> Any:
    """Return what a YAML text holds; `wrong` is what to say of one that holds nothing."""
    from ruamel.yaml import YAMLError

    try:
        return yaml.load(text)
    # Beside its own errors ruamel lets through those of the numbers, dates and keys that it makes.
    except (YAMLError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        detail = shown(" ".join(str(error).split()) or type(error).__name__)
        raise ParamsError(f"{wrong}: {detail}" if isinstance(error, YAMLError | ValueError) else wrong) from error


def _spelled(value: Any) -> str:
    """Return a value as Python writes it, bounded; a number with too many digits for that in words."""
    try:
        return shown(repr(value))
    except ValueError:
        return "a number of more than 4,300 digits"


def _nearest(key: str, choices: Any) -> str:
    """Return ` Did you mean X?` for the nearest of some keys, or nothing."""
    matches = difflib.get_close_matches(str(key), [str(choice) for choice in choices], n=1)
    return f" Did you mean {matches[0]}?" if matches else ""


def _describe(problem: Any, content: dict, file_name: str, overridden: set[tuple[str, ...]]) -> str:
    """Return one line for one pydantic problem: the place, the key, what is allowed, what was received."""
    # A union's branches appear in the location by their type's name; the file knows only keys and indices.
    node: Any = content
    location: list[str | int] = []
    for part in problem["loc"]:
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int)):
            node = node[part]
            location.append(part)
        elif problem["type"] in ("missing", "extra_forbidden"):
            location.append(part)
    name = ".".join(str(part) for part in location)
    # A value of the option may be a list, of which an entry is wrong.
    by_option = any(tuple(location[: len(option)]) == option for option in overridden)
    place = "--set" if by_option else f"{file_name}:{_line(content, location)}"
    if problem["type"] == "extra_forbidden":
        parent = Params
        for part in location[:-1]:
            if isinstance(part, str):
                parent = _section_in(parent.model_fields[part].annotation) or parent
        known = list(parent.model_fields)
        return f"{place}: {name} is not a setting.{_nearest(location[-1], known)} Allowed here: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"{place}: {name} is missing; every setting must be written out (git shows the default)."
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if problem["type"] == "value_error" and not location:
        # Of several sections: the message names its keys in full, the one to change first.
        named = {key: _at(content, key) for key in re.findall(r"\b[a-z_]+(?:\.\w+)+", message)}
        received = ", ".join(f"{key}={_spelled(value)}" for key, value in named.items())
        keys = [int(part) if part.isdigit() else part for part in next(iter(named)).split(".")]
        by_option = any(tuple(key.split("."))[: len(option)] == option for key in named for option in overridden)
        place = "--set" if by_option else f"{file_name}:{_line(content, keys)}"
        return f"{place}: {message}. Received: {received}"
    if problem["type"] == "value_error":
        message = f"{name}.{message}"
        return f"{place}: {message}. Received: {_flat(plain(node), message)}"
    return f"{place}: {name} {message[0].lower() + message[1:]}. Received: {name}={_spelled(plain(node))}"


def _at(content: Any, key: str) -> Any:
    """Return the plain value at a dotted key."""
    for part in key.split("."):
        content = content[int(part) if part.isdigit() else part]
    return plain(content)


def _section_in(annotation: Any) -> type[Section] | None:
    """Return the section type within `list[Rule] | None` and the like, or None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for each in get_args(annotation) if (found := _section_in(each))), None)


def _flat(values: Any, message: str) -> str:
    """Return a section's values on one line: those of the keys that the message names, or all if it names none."""
    if isinstance(values, dict):
        named = {key: value for key, value in values.items() if re.search(rf"\b{re.escape(key)}\b", message)}
        return ", ".join(f"{key}={_spelled(value)}" for key, value in (named or values).items())
    return _spelled(values)


def _line(content: Any, location: list[str | int]) -> int:
    """Return the line (from 1) of a key, or of the nearest section around it."""
    line, node = 1, content
    for part in location:
        position = getattr(node, "lc", None)
        if position is None or not isinstance(node, dict | list) or (isinstance(node, dict) and part not in node):
            break
        found = position.data.get(part) if position.data else None
        if found:
            line = found[0] + 1
        node = node[part]
    return line
