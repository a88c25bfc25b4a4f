"""A model's vocabulary as a GGUF file states it.

Source of keys and types: llama.cpp's `conversion/base.py` and `conversion/gemma.py`.
"""

from __future__ import annotations

import itertools
from typing import Any

import gguf

from stages.core.export.vocabulary import SPACE, merges
from stages.core.presets.gguf_tokenizer import MERGES, SENTENCEPIECE
from stages.core.presets.json_vocabulary import Piece
from stages.core.tokenize.chat import CHANNEL, CHANNEL_END, GEMMA, GEMMA4, TOOL_RESPONSE
from stages.core.tokenize.control_tokens import NAMES

UNUSED_SCORE = -10000.0
"""The score of a table row without a piece, as in llama.cpp's converter."""

SHOWN = {
    *(CHANNEL, CHANNEL_END, TOOL_RESPONSE, "<tool_response|>", "<|tool_call>", "<tool_call|>"),
    '<|"|>',
}
"""Gemma 4's tokens that are no control tokens in a GGUF file: llama.cpp shows them, so that what it writes can be taken
apart into thoughts, calls of tools and answers. A text that spells one becomes it."""


def add_vocabulary(
    writer: gguf.GGUFWriter, vocabulary: Any, rows: int, chat_template: str | None, *, by_merges: bool
) -> None:
    """State the tokenizer: a token for each row of the table.

    What spells a control token in text is one, if asked for (`parse_special`), only if its type says control; in most
    vocabularies of SentencePiece the turns' are user-defined. The other types are SentencePiece's, by its numbers.

    Args:
        writer: of the file.
        vocabulary: a SentencePiece `ModelProto`.
        rows: of the model's table.
        chat_template: Jinja, for instruct presets.
        by_merges: in the form that llama.cpp has for Gemma 4, of pieces and the pairs that make them; else in that of
            SentencePiece's BPE, with scores.
    """
    tokens, scores, types = [], [], []
    # Some tables have rows without a piece, and some vocabularies a piece for images beyond a text model's table.
    surplus = (Piece(piece=f"[PAD{number}]", score=UNUSED_SCORE, type=Piece.UNUSED) for number in range(rows))
    for piece in itertools.islice(itertools.chain(vocabulary.pieces, surplus), rows):
        kind = Piece.CONTROL if piece.type != Piece.UNKNOWN and NAMES.fullmatch(piece.piece) else piece.type
        text = piece.piece
        if by_merges and text in SHOWN:
            kind = Piece.USER_DEFINED
        elif by_merges and kind == Piece.USER_DEFINED and not text.strip(SPACE):
            # Pairs make runs of spaces.
            kind = Piece.NORMAL
        elif kind == Piece.USER_DEFINED:
            # llama.cpp looks for user-defined tokens before it writes spaces as U+2581.
            text = text.replace(SPACE, " ")
        tokens.append(text)
        scores.append(piece.score)
        types.append(int(kind))
    ids = {token: number for number, token in enumerate(tokens)}
    writer.add_tokenizer_model(MERGES if by_merges else SENTENCEPIECE)
    if not by_merges:
        writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    if by_merges:
        writer.add_token_merges([" ".join(pair) for pair in merges(vocabulary)])
    writer.add_bos_token_id(ids["<bos>"])
    writer.add_eos_token_id(ids["<eos>"])
    writer.add_pad_token_id(ids["<pad>"])
    writer.add_unk_token_id(types.index(Piece.UNKNOWN))
    if (end := (GEMMA4 if by_merges else GEMMA).end) in ids:
        writer.add_eot_token_id(ids[end])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if chat_template:
        writer.add_chat_template(chat_template)
