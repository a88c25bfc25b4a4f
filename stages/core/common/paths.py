"""The path of every input and output of the pipeline.

Purpose: the contract of `dvc.yaml` in one place, and `--out-root`: a trial writes below another folder and reads
from there what an earlier trial left, else from the repository.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from stages.core.common.errors import ParamsError, StageError, shown

MANIFEST = "models/preset/manifest.json"
REVIEWS = {"train": "data/imdb/train.parquet", "validation": "data/imdb/validation.parquet"}
TOKENS = {"train": "data/tokens/train.npz", "validation": "data/tokens/validation.npz"}
# The held-out reviews whole, for `evaluate`; the sequences of `validation` are for measuring while training.
HELD_OUT = "data/tokens/held_out.npz"
# Codes that `quantize` chose.
QUANTIZED = "models/quantized"
QUANTIZED_INDEX = f"{QUANTIZED}/index.json"
SHARDING = {"baseline": "data/sharding/base.json", "tuned": "data/sharding/tuned.json"}
PLAN = "data/sharding/plan.json"
CURVE = "data/plots/finetune.csv"
SAMPLES = "data/plots/samples.jsonl"
# A folder for each format.
EXPORT = "models/export"
REPORT = "data/report/index.html"
COMPARISON = "data/report/comparison.html"
SUMMARY = "data/run.json"


def variant_folder(variant: str) -> str:
    """Return the folder of one of the pipeline's own variants (`baseline` or `tuned`), relative to the root."""
    return f"models/{variant}"


def generated(variant: str) -> str:
    """Return the generations of a variant, relative to the root."""
    return f"data/generated/{variant}.jsonl"


def evaluation(variant: str) -> str:
    """Return the loss of each held-out review under a variant, relative to the root."""
    return f"data/evaluations/{variant}.csv"


def metrics(name: str) -> str:
    """Return a metrics file, relative to the root; of a stage with variants `name` is `stage/variant`."""
    return f"data/metrics/{name}.json"


def cache_folder() -> Path:
    """Return the folder for downloads and compiled programs: outside the repository, shared by all clones.

    `GEMMA_TUNING_CACHE` names it; else `$XDG_CACHE_HOME/gemma-tuning`, else `~/.cache/gemma-tuning`.

    Raises:
        StageError: the system knows no home folder, and no other is named.
    """
    named = os.environ.get("GEMMA_TUNING_CACHE")
    try:
        return Path(named or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/gemma-tuning").expanduser()
    except RuntimeError as error:
        raise StageError(
            f"A folder for downloads is needed. Received: {named or 'no home folder'}, unknown to this system\n"
            "Set GEMMA_TUNING_CACHE to a folder of your own."
        ) from error


def lend_a_home() -> None:
    """Use the cache folder as the home folder if there is none, as for a container's user without a name.

    For libraries that require one to look for their settings.
    """
    if os.path.expanduser("~") == "~":  # noqa: PTH111 (Path raises in this case)
        os.environ["HOME"] = str(cache_folder().absolute())


def own_path(root: Path, setting: str, value: str) -> Path:
    """Return the path that a setting names, absolute or relative to the repository; `~` is the home folder.

    Raises:
        ParamsError: the home folder of an unknown user, or a name that no file can have.
    """
    try:
        path = root / Path(value).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ParamsError(
            f"{setting} must be a path that can exist. Received: {setting}={shown(value)} ({shown(error, 60)})"
        ) from error
    return path


def inputs_of(
    paths: Paths, stage: str, variant: str | None, adapters: Mapping[str, str], start_from: str | None
) -> dict[str, Path]:
    """Return the files and folders that each process of a stage reads itself, by their names, where they exist.

    The baseline's `model.json` is not among them: the first process shares it with the others.

    Args:
        paths: of inputs and outputs.
        stage: load, finetune, generate or evaluate.
        variant: of generate and evaluate; None: tuned.
        adapters: the setting `variants`.
        start_from: the setting `finetune.start_from`.
    """
    wanted = [MANIFEST]
    own = adapters.get(variant or "")
    if stage == "finetune":
        wanted += TOKENS.values()
        own = start_from
    elif stage != "load" and variant in (None, "tuned"):
        wanted += [variant_folder("tuned")]
    if stage == "evaluate":
        wanted += [HELD_OUT, REVIEWS["validation"]]
    found = {} if own is None else {own: own_path(paths.root, "variants", own)}
    for name in wanted:
        with contextlib.suppress(StageError):
            found[name] = paths.read(name)
    return found


@dataclass(frozen=True)
class Paths:
    """The repository's folder, and the folder that outputs go to (the same unless `--out-root` is given)."""

    root: Path
    out_root: Path

    def read(self, relative: str) -> Path:
        """Return an input's path: below `out_root` if it exists there, else below `root`.

        Raises:
            StageError: it is in neither; the message names the stage that makes it.
        """
        for base in (self.out_root, self.root):
            if (base / relative).exists():
                return base / relative
        raise StageError(
            f"The input {relative} does not exist. Run `dvc repro`, or the stage that writes it: {maker_of(relative)}."
        )

    def write(self, relative: str) -> Path:
        """Return an output's path, after making its folder."""
        path = self.out_root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


# Prefixes of paths, and the stage that writes them.
MAKERS = {
    "models/preset": "fetch",
    "data/imdb": "prepare",
    "data/metrics/prepare": "prepare",
    "data/tokens": "tokenize",
    "data/metrics/tokenize": "tokenize",
    "models/quantized": "quantize",
    "data/metrics/quantize": "quantize",
    "models/baseline": "load",
    "data/sharding/base": "load",
    "data/metrics/load": "load",
    "models/tuned": "finetune",
    "data/sharding/tuned": "finetune",
    "data/plots": "finetune",
    "data/metrics/finetune": "finetune",
    "data/generated": "generate",
    "data/metrics/generate": "generate",
    "data/evaluations": "evaluate",
    "data/metrics/evaluate": "evaluate",
    "data/metrics/compare": "compare",
    "models/export": "export",
    "data/metrics/export": "export",
    "data/sharding/plan": "plan",
    "data/report": "report",
    "data/run.json": "report",
}
# Of these stages each variant of the model has a file, named after it.
OF_VARIANTS = ("generate", "evaluate")


def maker_of(relative: str) -> str:
    """Return the command of the stage that writes a path."""
    for prefix, stage in MAKERS.items():
        if relative.startswith(prefix):
            variant = f" --variant {PurePosixPath(relative).stem}" if stage in OF_VARIANTS else ""
            return f"python -m stages.{stage}{variant}"
    return "dvc repro"


def check_outputs(out_root: Path, stage: str) -> None:
    """Check at the start that a stage's output folders are writable, rather than fail after minutes of work.

    Args:
        out_root: the folder that outputs go to.
        stage: as in `MAKERS`; one that is not there writes nothing.

    Raises:
        OSError: `filename` is the folder, or the nearest one above it that is there.
    """
    places = [out_root / relative for relative, maker in MAKERS.items() if maker == stage]
    folders = [place.parent if place.suffix else place for place in places]
    for folder in {next(path for path in (folder, *folder.parents) if path.exists()) for folder in folders}:
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            error.filename, error.filename2 = str(folder), None
            raise
