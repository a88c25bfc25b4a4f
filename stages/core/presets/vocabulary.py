"""A preset's vocabulary piece by piece, with the scores that decide how text is merged: what a GGUF file has to hold.

Reads: the SentencePiece model of a preset's folder, or the `tokenizer.json` that stands for one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import sentencepiece_model_pb2

from stages.core.common.errors import StageError, shown
from stages.core.presets.gguf_file import only_file
from stages.core.presets.gguf_tokenizer import tokenizer_proto
from stages.core.presets.hf_tokenizer import CONTROL, IMAGE, vocabulary_files
from stages.core.presets.tokenizer import HUGGING_FACE_VOCABULARY, JSON_VOCABULARY, KERAS_VOCABULARY
from stages.core.presets.untrusted import read_object

TYPES = sentencepiece_model_pb2.ModelProto.SentencePiece
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Piece(NamedTuple):
    """A piece of a vocabulary.

    Attributes:
        text: spaces are U+2581, as SentencePiece writes them.
        score: of two pieces that could be merged, the one with the higher score is.
        kind: SentencePiece's number of its type, which GGUF took over: 1 normal, 2 unknown, 3 control, 4 user-defined
            (found in text before anything is merged), 5 unused, 6 a byte.
    """

    text: str
    score: float
    kind: int


def pieces_of(folder: Path, file_format: str) -> list[Piece]:
    """Return the pieces of a preset's vocabulary, by their ids.

    Args:
        folder: of the preset.
        file_format: the manifest's: `gguf`, `keras` or `safetensors`.

    Raises:
        StageError: the vocabulary cannot be read.
    """
    if file_format == "gguf":
        return _of_proto(tokenizer_proto(only_file(folder)))
    if file_format == "safetensors" and vocabulary_files(folder)[0] == JSON_VOCABULARY:
        return _of_json(read_object(folder / JSON_VOCABULARY))
    name = KERAS_VOCABULARY if file_format == "keras" else HUGGING_FACE_VOCABULARY
    try:
        return _of_proto((folder / name).read_bytes())
    except OSError as error:
        raise StageError(f"The preset must hold {name}. Received: folder={folder} ({error.strerror})") from error


def _of_proto(proto: bytes) -> list[Piece]:
    """Return the pieces of a serialized SentencePiece model, which `load_tokenizer` could read."""
    model = sentencepiece_model_pb2.ModelProto.FromString(proto)
    return [Piece(piece.piece, piece.score, piece.type) for piece in model.pieces]


def _of_json(content: dict[str, Any]) -> list[Piece]:
    """Return the pieces of a `tokenizer.json`, whose merges are those of a SentencePiece model, in order of its scores.

    transformers lists a merge for each pair of pieces that make a third, the highest score of the third first: so the
    place of its first merge, negated, orders pieces as their scores did.
    """
    try:
        words: dict[str, int] = content["model"]["vocab"]
        merges = [tuple(each.split(" ") if isinstance(each, str) else each) for each in content["model"]["merges"]]
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        scores: dict[str, float] = {}
        for place, (left, right) in enumerate(merges):
            scores.setdefault(left + right, -float(place))
        by_id = {number: word for word, number in {**words, **added}.items()}
        lowest = -float(len(merges))
        return [_piece(by_id.get(number), scores, lowest, added) for number in range(1 + max(by_id))]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StageError(
            f"The vocabulary must be a tokenizer.json as transformers writes it. Received: {shown(error)}"
        ) from error


def _piece(word: str | None, scores: dict[str, float], lowest: float, added: dict[str, int]) -> Piece:
    """Return the piece of a word, None for an id that no word has."""
    if word is None:
        return Piece("", lowest, TYPES.UNUSED)
    if word == "<unk>":
        kind = TYPES.UNKNOWN
    elif word in CONTROL or word == IMAGE:
        kind = TYPES.CONTROL
    elif word in added:
        kind = TYPES.USER_DEFINED
    else:
        kind = TYPES.BYTE if BYTE.fullmatch(word) else TYPES.NORMAL
    return Piece(word, scores.get(word, lowest), kind)
