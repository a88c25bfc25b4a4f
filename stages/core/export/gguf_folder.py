"""The folder of the format gguf: the merged model, a Modelfile for Ollama, and the adapter alone for llama-server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from stages.core.export.adapter import common_rank, lora_modules, peft_tensors
from stages.core.export.gguf import write_gguf
from stages.core.export.gguf_adapter import write_gguf_adapter
from stages.core.export.hugging_face_tokenizer import chat_template
from stages.core.export.modelfile import modelfile
from stages.core.export.tensors import hugging_face_tensors
from stages.core.export.tuned import MergedWeights, Tuned
from stages.core.export.vocabulary import sentencepiece_model
from stages.core.files import write_text
from stages.core.presets.architecture import Architecture
from stages.core.presets.formats import WeightSource, format_of

MODEL = "model.gguf"
# In a folder of its own: a folder with one GGUF file is what our reader, and others, take for a model.
ADAPTER = "lora/adapter.gguf"


def write_folder(folder: Path, tuned: Tuned, weights: MergedWeights, kind: str, *, chat: bool) -> None:
    """Write the folder.

    Args:
        folder: to write to.
        tuned: the variant.
        weights: after tuning, with the adapter merged in.
        kind: of the matrices: F32, F16, BF16 or Q8_0.
        chat: with the chat template, in the file and in the Modelfile.

    Raises:
        StageError: llama.cpp cannot express the model, or F16 does not hold a weight.
        OSError: the disk is full, or a file cannot be written.
    """
    manifest, architecture = tuned.preset.manifest, tuned.preset.architecture
    name = f"{manifest.preset}, fine-tuned"
    write_gguf(
        folder / MODEL,
        architecture,
        hugging_face_tensors(weights),
        sentencepiece_model(tuned.preset),
        kind,
        name=name,
        terms=manifest.license,
        chat_template=chat_template(architecture) if chat else None,
    )
    write_text(folder / "Modelfile", modelfile(MODEL, manifest.license, architecture if chat else None))
    if modules := lora_modules(tuned):
        tensors = peft_tensors(tuned, modules)
        write_gguf_adapter(folder / ADAPTER, architecture, tensors, common_rank(modules), name=name)


@contextlib.contextmanager
def read_folder(folder: Path) -> Iterator[tuple[Architecture, WeightSource]]:
    """Yield the architecture and the weights of the model that was written, by the reader of presets.

    Raises:
        StageError: the file is not what it should be.
    """
    form = format_of("gguf")
    architecture = form.read_architecture(folder)
    with form.open_weights(folder, architecture) as weights:
        yield architecture, weights
