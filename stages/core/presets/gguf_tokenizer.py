"""The tokenizer within a GGUF file as a SentencePiece model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from sentencepiece import sentencepiece_model_pb2

from stages.core.common.errors import StageError
from stages.core.presets.gguf_file import field_of, only_file, open_file
from stages.core.presets.json_vocabulary import model_of_json
from stages.core.presets.tokenizer import Tokenizer

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6
"""Token types; GGUF took over the numbers of SentencePiece's `ModelProto.SentencePiece.Type`."""

SENTENCEPIECE, MERGES = "llama", "gemma4"
"""Kinds of tokenizers: pieces with scores, or pieces and the pairs that make them."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of the .gguf file of a folder.

    Raises:
        StageError: there is not one such file, or its tokenizer is of another kind.
    """
    return Tokenizer.from_proto(tokenizer_proto(only_file(folder)))


def tokenizer_proto(path: Path) -> bytes:
    """Return the file's tokenizer as a SentencePiece model: BPE with byte fallback, no normalizing, no dummy prefix.

    Raises:
        StageError: the file is not the GGUF of a Gemma, or its tokenizer is of another kind.
    """
    reader = open_file(path)
    kind = field_of(reader, "tokenizer.ggml.model")
    tokens = field_of(reader, "tokenizer.ggml.tokens")
    scores = field_of(reader, "tokenizer.ggml.scores")
    types = field_of(reader, "tokenizer.ggml.token_type")
    lists = all(isinstance(each, list) and each for each in (tokens, scores, types))
    if kind not in (SENTENCEPIECE, MERGES) or not lists or not len(tokens) == len(scores) == len(types):
        raise StageError(
            "The GGUF file must hold a SentencePiece tokenizer (tokens, scores and types, of equal length). "
            f"Received: tokenizer.ggml.model={kind!r} in {path}"
        )
    special = {
        name: field_of(reader, f"tokenizer.ggml.{name}_token_id") for name in ("padding", "eos", "bos", "unknown")
    }
    for name, number in special.items():
        if not isinstance(number, int) or not 0 <= number < len(tokens):
            raise StageError(f"The GGUF file must state tokenizer.ggml.{name}_token_id. Received: {number} in {path}")
    kinds = set(sentencepiece_model_pb2.ModelProto.SentencePiece.Type.values())
    if (
        not all(isinstance(token, str) for token in tokens)
        or not kinds.issuperset(types)
        or not np.isfinite(scores).all()
    ):
        raise StageError(f"The GGUF file must hold tokens with scores and known types. Received: others in {path}")
    if kind == MERGES:
        model = _of_merges(reader, tokens, types, path)
    else:
        model = _of_scores(tokens, scores, types, special)
        model.normalizer_spec.add_dummy_prefix = bool(field_of(reader, "tokenizer.ggml.add_space_prefix", False))
    proto: bytes = model.SerializeToString(deterministic=True)
    return proto


def _of_merges(reader: gguf.GGUFReader, tokens: list[str], types: list[int], path: Path) -> Any:
    """Return the model of pieces and of the pairs that make them, each pair with a space between its two."""
    merges = field_of(reader, "tokenizer.ggml.merges")
    # A piece may begin with a space of its own; Gemma's write theirs as U+2581.
    if not isinstance(merges, list) or not all(isinstance(each, str) and each.count(" ") == 1 for each in merges):
        raise StageError(f"The GGUF file must state tokenizer.ggml.merges, pairs of pieces. Received: others in {path}")
    added = (CONTROL, USER_DEFINED, UNKNOWN)
    model = model_of_json(
        {
            "model": {"vocab": {token: number for number, token in enumerate(tokens)}, "merges": merges},
            "added_tokens": [
                {"id": number, "content": tokens[number]} for number, kind in enumerate(types) if kind in added
            ],
        }
    )
    for piece, kind in zip(model.pieces, types, strict=True):
        if kind == UNUSED:
            piece.type = UNUSED
    return model


def _of_scores(tokens: list[str], scores: list[float], types: list[int], special: dict[str, int]) -> Any:
    """Return the model of pieces with scores."""
    proto = sentencepiece_model_pb2.ModelProto()
    for number, (token, score, token_type) in enumerate(zip(tokens, scores, types, strict=True)):
        piece = proto.pieces.add()
        # GGUF writes runs of spaces as they are; SentencePiece looks for pieces in text whose spaces are escaped.
        piece.piece = token.replace(" ", "\N{LOWER ONE EIGHTH BLOCK}") if token_type == USER_DEFINED else token
        piece.score = score
        # GGUF files say "control" of the unknown token; SentencePiece then knows none: a missing piece gets -1.
        piece.type = UNKNOWN if number == special["unknown"] else token_type
    trainer = proto.trainer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = BYTE in types
    trainer.pad_id, trainer.pad_piece = special["padding"], tokens[special["padding"]]
    trainer.eos_id, trainer.eos_piece = special["eos"], tokens[special["eos"]]
    trainer.bos_id, trainer.bos_piece = special["bos"], tokens[special["bos"]]
    trainer.unk_id, trainer.unk_piece = special["unknown"], tokens[special["unknown"]]
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return proto
