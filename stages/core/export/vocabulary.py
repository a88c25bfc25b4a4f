"""The vocabulary in the two files that others read: a SentencePiece model, and `tokenizer.json`.

Purpose: transformers 5 reads `tokenizer.json` alone, llama.cpp and keras-hub the SentencePiece model; a preset has one
of them, or the tokens within a GGUF file.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from stages.core.load.variants import Preset
from stages.core.presets import gguf_file, gguf_tokenizer
from stages.core.presets.json_vocabulary import SPECIAL, Piece, model_of_json
from stages.core.presets.tokenizer import HUGGING_FACE_VOCABULARY, JSON_VOCABULARY, KERAS_VOCABULARY
from stages.core.presets.untrusted import read_object
from stages.core.tokenize.control_tokens import NAMES

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
BPE = {
    "type": "BPE",
    "dropout": None,
    "unk_token": "<unk>",
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": True,
    "byte_fallback": True,
    "ignore_merges": False,
}
"""Gemma's kind of model in a `tokenizer.json`, without its pieces and merges."""


def sentencepiece_model(preset: Preset) -> Any:
    """Return a preset's vocabulary as a SentencePiece `ModelProto` with the types of Gemma's own `tokenizer.model`.

    There all but padding, end, beginning and unknown are user-defined, which SentencePiece finds in a text; GGUF files
    call the control tokens among them `control`.

    Raises:
        StageError: the preset has no vocabulary, or not one of a Gemma.
    """
    names = frozenset(file.name for file in preset.manifest.files)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(_own_model(preset.folder, preset.manifest.format, names, preset.fingerprint))
    for piece in model.pieces:
        if piece.type == Piece.CONTROL and piece.piece not in SPECIAL:
            piece.type = Piece.USER_DEFINED
    return model


@functools.lru_cache(maxsize=1)
def _own_model(folder: Path, form: str, names: frozenset[str], fingerprint: str) -> bytes:
    """Return the SentencePiece model of a preset's files, identified by the fingerprint: read once."""
    if form == "gguf":
        return gguf_tokenizer.tokenizer_proto(gguf_file.only_file(folder))
    if form == "keras":
        return (folder / KERAS_VOCABULARY).read_bytes()
    if JSON_VOCABULARY in names:
        found: bytes = model_of_json(read_object(folder / JSON_VOCABULARY)).SerializeToString(deterministic=True)
        return found
    return (folder / HUGGING_FACE_VOCABULARY).read_bytes()


def added_tokens(model: Any) -> list[dict[str, Any]]:
    """Return the tokens that are found in a text before it is split, as `tokenizer.json` lists them."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": number, "content": piece.piece, **plain, "special": NAMES.fullmatch(piece.piece) is not None}
        for number, piece in enumerate(model.pieces)
        if piece.type in (Piece.CONTROL, Piece.USER_DEFINED, Piece.UNKNOWN)
    ]


def merges(model: Any) -> list[list[str]]:
    """Return the pairs that byte-pair encoding joins, the first one first.

    SentencePiece takes user-defined pieces out of a text before it joins anything. Of those only runs of spaces are no
    added tokens to the other library, which sees them after spaces have been replaced: their pairs come first, the
    longest left part first, so that a run grows from its left end.
    """
    ids = {piece.piece: number for number, piece in enumerate(model.pieces)}
    found = []
    for word, number in ids.items():
        piece = model.pieces[number]
        if piece.type not in (Piece.NORMAL, Piece.USER_DEFINED) or len(word) < 2:
            continue
        run = piece.type == Piece.USER_DEFINED
        if run and word.strip(SPACE):
            continue
        score = float("inf") if run else piece.score
        for cut in range(1, len(word)):
            left, right = word[:cut], word[cut:]
            if left in ids and right in ids:
                found.append((-score, -cut, cut - len(word), left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def tokenizer_json(model: Any) -> dict[str, Any]:
    """Return the content of a `tokenizer.json`, as transformers' converter makes it of Gemma's SentencePiece model."""
    bos = "<bos>"
    number = next(number for number, piece in enumerate(model.pieces) if piece.piece == bos)
    begin, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    begin_2, text_2 = {"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(model),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, begin_2, text_2],
            "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": [*decoders, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            **BPE,
            "vocab": {piece.piece: number for number, piece in enumerate(model.pieces)},
            "merges": merges(model),
        },
    }


def json_of_preset(preset: Preset, model: Any) -> dict[str, Any]:
    """Return a preset's own `tokenizer.json` where it has one, without a length to cut to, else one of its model."""
    path: Path = preset.folder / JSON_VOCABULARY
    if preset.manifest.format == "safetensors" and any(file.name == path.name for file in preset.manifest.files):
        return {**read_object(path), "truncation": None, "padding": None}
    return tokenizer_json(model)
