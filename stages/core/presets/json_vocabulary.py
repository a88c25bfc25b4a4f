"""The content of a `tokenizer.json` as a SentencePiece model.

Purpose: presets of Gemma 4 have their vocabulary in this form alone, as pieces and the pairs that make them.
"""

from __future__ import annotations

import re
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from stages.core.common.errors import StageError
from stages.core.presets.tokenizer import IMAGE

Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def model_of_json(content: dict[str, Any]) -> Any:
    """Return the vocabulary of a `tokenizer.json` as a SentencePiece model.

    A piece's score is the place of the first merge that makes it, so that SentencePiece joins in the same order.

    Raises:
        StageError: an id has no token.
    """
    words = {number: word for word, number in content["model"]["vocab"].items()}
    added = {each["id"]: each["content"] for each in content.get("added_tokens") or [] if each["content"] != IMAGE}
    words |= added
    places: dict[str, int] = {}
    for place, merge in enumerate(content["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        places.setdefault(left + right, place)
    model = sentencepiece_model_pb2.ModelProto()
    for number in range(max(words) + 1):
        if number not in words:
            raise StageError(f"A vocabulary must have a token for each id. Received: none for {number} of {max(words)}")
        word = words[number]
        kind = Piece.BYTE if BYTE.fullmatch(word) else Piece.USER_DEFINED if number in added else Piece.NORMAL
        if word in SPECIAL:
            kind = Piece.UNKNOWN if word == "<unk>" else Piece.CONTROL
        score = 0.0 if kind != Piece.NORMAL else -float(places.get(word, len(places)))
        model.pieces.add(piece=word, score=score, type=kind)
    ids = {piece.piece: number for number, piece in enumerate(model.pieces)}
    trainer = model.trainer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    trainer.vocab_size, trainer.byte_fallback = len(model.pieces), True
    trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = (ids.get(piece, -1) for piece in SPECIAL)
    trainer.pad_piece, trainer.eos_piece, trainer.bos_piece, trainer.unk_piece = SPECIAL
    normalizer = model.normalizer_spec
    normalizer.name, normalizer.add_dummy_prefix = "identity", False
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    return model
