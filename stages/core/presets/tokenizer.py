"""Text to token ids and back, by the SentencePiece library or a replacement of it.

Purpose: the same ids as keras-hub's and transformers' tokenizers give, without importing TensorFlow (4 s) as those do.
Reads: a preset's SentencePiece model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from stages.core.common.errors import StageError

KERAS_VOCABULARY = "assets/tokenizer/vocabulary.spm"
"""Where keras-hub's `save_to_preset` puts the SentencePiece model, below the preset's folder."""

HUGGING_FACE_VOCABULARY = "tokenizer.model"
"""Where Hugging Face folders of Gemma have it, those of transformers 5 no longer."""

JSON_VOCABULARY = "tokenizer.json"
"""What transformers reads where it is there: it knows the tokens that a fine-tuning added."""

ADDED_TOKENS = "added_tokens.json"
"""Tokens that a `tokenizer.model` lacks, by their ids."""

IMAGE = "<image_soft_token>"
"""Stands for a part of an image in every Gemma 3, beyond the rows of a text model's table: no text spells it."""

TURNS, TURNS_OF_GEMMA4 = "<start_of_turn>", "<|turn>"
"""What begins a turn; both vocabularies have 262,144 pieces, and these at one place."""


def holds_vocabulary(name: str) -> bool:
    """Return whether a preset's file, by its name below the preset's folder, is what `load_tokenizer` reads."""
    names = (KERAS_VOCABULARY, HUGGING_FACE_VOCABULARY, JSON_VOCABULARY, ADDED_TOKENS)
    return name in names or name.endswith(".gguf")


class Tokenizer:
    """A Gemma tokenizer.

    Attributes:
        pad, eos, bos: ids of the special tokens; in every Gemma 0, 1 and 2.
        vocabulary_size: number of pieces; the model's embedding may have more rows.
    """

    def __init__(self, processor: Any) -> None:
        """Take the special ids from the pieces `<pad>`, `<eos>` and `<bos>`, as keras-hub does.

        Args:
            processor: a SentencePieceProcessor, or what has the methods of one that are used here.

        Raises:
            StageError: the vocabulary lacks one of them.
        """
        self._processor = processor
        self.vocabulary_size: int = processor.vocab_size()
        self.pad, self.eos, self.bos = (self._special(piece) for piece in ("<pad>", "<eos>", "<bos>"))

    @classmethod
    def from_proto(cls, proto: bytes) -> Tokenizer:
        """Return the tokenizer of a serialized SentencePiece model.

        Raises:
            StageError: the bytes are no such model, or it is not a Gemma vocabulary.
        """
        processor = sentencepiece.SentencePieceProcessor()
        try:
            # The library takes no bytes at all for "nothing to load" and then reports an empty vocabulary.
            loaded = bool(proto) and processor.LoadFromSerializedProto(proto)
        except (RuntimeError, OSError, ValueError):
            loaded = False
        if not loaded:
            raise StageError(
                f"The vocabulary must be a SentencePiece model. Received: {len(proto)} bytes of something else"
            )
        return cls(processor)

    @classmethod
    def from_file(cls, folder: Path, name: str, kind: str) -> Tokenizer:
        """Return the tokenizer of a SentencePiece model in a preset's folder.

        Args:
            folder: of the preset.
            name: of the file, below the folder.
            kind: of preset, for the message.

        Raises:
            StageError: no such file, or as `from_proto`.
        """
        try:
            return cls.from_proto((folder / name).read_bytes())
        except OSError as error:
            raise StageError(f"{kind} must hold {name}. Received: folder={folder} ({error.strerror})") from error

    def piece_id(self, piece: str) -> int | None:
        """Return the id of a piece, or None if the vocabulary has no such piece."""
        number = self._processor.piece_to_id(piece)
        return number if self._processor.id_to_piece(number) == piece else None

    def pieces(self) -> Iterable[tuple[str, int]]:
        """Return all pieces with their ids."""
        named = ((self._processor.id_to_piece(number), number) for number in range(self.vocabulary_size))
        return ((piece, number) for piece, number in named if isinstance(piece, str))

    def check_family(self, class_name: str) -> None:
        """Check that the vocabulary is not that of another family than the model: it would run, and mean other words.

        Args:
            class_name: of keras-hub's backbone.

        Raises:
            StageError: a Gemma 4 has the vocabulary of an earlier Gemma, or the other way round.
        """
        own, other = TURNS, TURNS_OF_GEMMA4
        if class_name == "Gemma4Backbone":
            own, other = other, own
        if self.piece_id(other) is not None and self.piece_id(own) is None:
            raise StageError(
                f"The vocabulary must be of the model's family, in which a turn begins with {own}. Received: one with "
                f"{other}, of {'Gemma 3' if other == TURNS else 'Gemma 4'}, with a {class_name}\n"
                "Take the tokenizer's files from the checkpoint that the weights are from."
            )

    def _special(self, piece: str) -> int:
        """Return the id of a special piece, which the vocabulary must have."""
        number = self.piece_id(piece)
        if number is None:
            raise StageError(
                f"A Gemma vocabulary must have the piece {piece}. Received: {self.vocabulary_size} other pieces"
            )
        return number

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without BOS and EOS; none for an empty text."""
        return self._processor.encode(text)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, as `encode` does, on all cores."""
        return self._processor.encode(list(texts), num_threads=-1)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; bytes that are no UTF-8 become U+FFFD.

        Pad, BOS and EOS leave no trace: they are control pieces, which SentencePiece decodes to nothing.
        """
        # A row of the table without a piece has no text.
        return self._processor.decode([int(number) for number in ids if 0 <= number < self.vocabulary_size])
