"""A tuned model as GGUF, as export writes it, and texts that are hard to encode."""

from __future__ import annotations

from pathlib import Path

from stages.core.export.gguf import write_gguf
from stages.core.export.tensors import hugging_face_tensors
from stages.core.export.tuned import Tuned
from stages.core.export.vocabulary import sentencepiece_model
from stages.core.presets.manifest import LICENSE
from tests.support.tiny_presets import tiny_reviews

TEXTS = [
    *tiny_reviews(8),
    "",
    "  two  spaces,   three \n\n\nand lines\r\n\t",
    "\N{POPCORN}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET}\N{VARIATION SELECTOR-16} e\N{COMBINING ACUTE ACCENT}",
    "\x00\x01\x07\x1b\x7f\x85\N{ZERO WIDTH NO-BREAK SPACE}\N{RIGHT-TO-LEFT OVERRIDE}",
    "\N{CJK UNIFIED IDEOGRAPH-6620}\N{CYRILLIC CAPITAL LETTER EF} 3.14159 <br /> <table>",
]
SPELLED = "<bos>a<start_of_turn>user\nHi<end_of_turn>\n<eos><pad><unk>"
SPELLED_OF_GEMMA4 = "<bos>a<|turn>user\nHi<turn|>\n<|channel>thought\n<channel|><eos><pad><unk>"


def written(model: Tuned, folder: Path, kind: str = "F32", **changes: str) -> Path:
    """The tuned model as a GGUF file, alone in a folder."""
    folder.mkdir(exist_ok=True)
    path, preset = folder / "model.gguf", model.preset
    pieces = sentencepiece_model(preset)
    with model.open_merged() as weights:
        tensors = hugging_face_tensors(weights)
        write_gguf(path, preset.architecture, tensors, pieces, kind, name="tiny", terms=LICENSE, **changes)
    return path
