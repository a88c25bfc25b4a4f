"""`--verify`: what was written, read by the libraries that it was written for, compared with the tuned model."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stages.core.common.errors import StageError
from stages.core.export import huggingface, llama_cpp, proof
from stages.core.export.exporting import Reference, check_difference, check_ids
from stages.core.export.formats import FORMATS, left_out
from stages.core.export.gguf_folder import MODEL
from stages.core.export.tuned import TrainedWeights
from stages.core.export.vocabulary import SPACE
from stages.core.load.backbone import import_keras_hub
from stages.core.records.layout import LoraConfig

OWN_ROUNDING = {"gguf": 1e-3}
"""How far a library's logits are off whatever it reads, as a fraction of their range: llama.cpp has GELU in a table of
half-precision numbers, for one. Measured against transformers on tiny models: 5e-4."""
OWN_ROUNDING_QUANTIZED = {"Q8_0": 0.06}
"""The same with weights of a type whose products llama.cpp takes with activations rounded to 8 bits too: 0.033 measured
with the embedded model, of which the weights alone, by this project's reader, make 0.015."""


def verify(compared: Reference, root: Path) -> Iterator[str]:
    """Compare each format of the settings with the tuned model, and yield a line for each.

    Args:
        compared: from `exporting.reference`: what was exported.
        root: with a folder for each format.

    Raises:
        StageError: a format is not there, or the library computes something else of it.
    """
    job = compared.job
    for name in job.settings.formats:
        if name in left_out(job):
            yield f"{name}: left out, {left_out(job)[name]}."
            continue
        if name == "peft" and job.settings.base == "vision":
            yield "peft: not verified, its names fit a base with a vision tower, and the preset is a text model."
            continue
        if not (root / name).is_dir():
            raise StageError(
                f"models/export/{name} must be there to be verified. Received: no such folder. Run `dvc repro export`."
            )
        libraries, check = LIBRARIES[name]
        if lacking := [each for each in libraries if importlib.util.find_spec(each) is None]:
            yield f"{name}: not verified, {' and '.join(lacking)} is not installed (requirements-readers.txt has it)."
            continue
        logits = check(root / name, compared)
        measured = proof.difference(compared.of(name), _Given(logits), logits.shape[1])
        own = OWN_ROUNDING_QUANTIZED.get(FORMATS[name].numbers(job.settings), OWN_ROUNDING.get(name, 0.0))
        tolerance = max(FORMATS[name].tolerance(job, measured.range), own * measured.range)
        check_difference(f"models/export/{name}, read by {libraries[0]},", measured, tolerance)
        yield (
            f"{name}: by {libraries[0]} the logits differ by at most {measured.largest:.1e} of {measured.range:.1f}, "
            f"the likeliest token is the same at {measured.same_choice:.1%} of positions."
        )


class _Given:
    """Logits that are there already."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def logits(self, rows: slice) -> np.ndarray:
        return self._values[:, rows].astype(np.float32, copy=False)


def _by_transformers(folder: Path, compared: Reference) -> np.ndarray:
    """Read a Hugging Face folder, tokenizer and all."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = proof.again(tokenizer(proof.TEXT)["input_ids"], len(compared.ids))
    check_ids(f"{folder.name}'s tokenizer in transformers", ids, compared.ids)
    return _torch_logits(_pretrained(folder), compared)


def _by_peft(folder: Path, compared: Reference) -> np.ndarray:
    """Put the adapter on the base, which is written for transformers first, aside."""
    import peft

    base = dataclasses.replace(compared.job.tuned, trained=TrainedWeights(None), lora=LoraConfig(0))
    with tempfile.TemporaryDirectory() as aside:
        with base.open_merged() as weights:
            huggingface.write_folder(Path(aside), base.preset, weights, "float32", chat=False, ends=[1])
        model = peft.PeftModel.from_pretrained(_pretrained(Path(aside)), str(folder))
        return _torch_logits(model, compared)


def _by_keras_hub(folder: Path, compared: Reference) -> np.ndarray:
    """Read a preset by keras-hub, which computes the logits too."""
    backbone = import_keras_hub().models.Backbone.from_preset(str(folder), dtype="float32")
    ids = np.array([compared.ids], np.int32)
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    if "position_ids" in backbone.input:
        inputs["position_ids"] = np.arange(ids.shape[1], dtype=np.int32)[None]
    hidden = backbone.predict(inputs, verbose=0)
    logits = backbone.token_embedding(hidden[:, -len(compared.reading.hidden) :], reverse=True)
    return np.asarray(logits[0])


def _by_llama_cpp(folder: Path, compared: Reference) -> np.ndarray:
    """Read a GGUF file, tokenizer and all, in llama.cpp.

    It looks for runs of spaces before it writes spaces as U+2581: one that a text has already becomes another token
    there than in SentencePiece, whoever wrote the file.
    """
    text = proof.TEXT.replace(SPACE, "")
    wanted = proof.text_ids(compared.job.tokenizer, compared.job.architecture, text)
    with llama_cpp.opened(folder / MODEL) as model:
        ids = proof.again(model.encode(text, add_special=True, parse_special=True), len(wanted))
        check_ids(f"{folder.name}'s tokenizer in llama.cpp", ids, wanted)
        return model.logits(compared.ids, last=len(compared.reading.hidden))


def _pretrained(folder: Path) -> Any:
    """Return the model of a Hugging Face folder, in float32; transformers sets it to evaluation itself."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _torch_logits(model: Any, compared: Reference) -> np.ndarray:
    """Return a model's logits at the positions that are compared."""
    import torch

    ids = torch.tensor([compared.ids])
    with torch.no_grad():
        return model(input_ids=ids, logits_to_keep=len(compared.reading.hidden)).logits[0].float().numpy()


Check = Callable[[Path, Reference], np.ndarray]
LIBRARIES: dict[str, tuple[tuple[str, ...], Check]] = {
    "peft": (("peft", "transformers", "torch"), _by_peft),
    "huggingface": (("transformers", "torch"), _by_transformers),
    "keras": (("keras_hub",), _by_keras_hub),
    "gguf": (("xllamacpp",), _by_llama_cpp),
}
"""By format: the packages that it takes, the one that is named first, and what reads it and gives its logits at the
positions that are compared."""
