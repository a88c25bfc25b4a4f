"""Text to token ids and back, by the SentencePiece library alone.

Purpose: the same ids as keras-hub's tokenizers give, without importing TensorFlow (4 s) as those do.
Reads: a preset folder: the .gguf file's tokenizer, `assets/tokenizer/vocabulary.spm`, or `tokenizer.model`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from stages.core.errors import StageError

KERAS_VOCABULARY = "assets/tokenizer/vocabulary.spm"
"""Where keras-hub's `save_to_preset` puts the SentencePiece model, below the preset's folder."""

HUGGING_FACE_VOCABULARY = "tokenizer.model"
"""Where Hugging Face folders of Gemma have it."""


def holds_vocabulary(name: str) -> bool:
    """Return whether a preset's file, by its name below the preset's folder, is what `load_tokenizer` reads."""
    return name in (KERAS_VOCABULARY, HUGGING_FACE_VOCABULARY) or name.endswith(".gguf")


class Tokenizer:
    """A Gemma tokenizer.

    Attributes:
        pad, eos, bos: ids of the special tokens; in every Gemma 0, 1 and 2.
        vocabulary_size: number of pieces; the model's embedding may have more rows.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        """Take the special ids from the pieces `<pad>`, `<eos>` and `<bos>`, as keras-hub does.

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

    def piece_id(self, piece: str) -> int | None:
        """Return the id of a piece, or None if the vocabulary has no such piece."""
        number = self._processor.piece_to_id(piece)
        return number if self._processor.id_to_piece(number) == piece else None

    def pieces(self) -> Iterable[tuple[str, int]]:
        """Return all pieces with their ids."""
        ids = range(self.vocabulary_size)
        return zip(self._processor.id_to_piece(list(ids)), ids, strict=True)

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
        return self._processor.decode([int(number) for number in ids])


def load_tokenizer(folder: Path, format: str) -> Tokenizer:
    """Return the tokenizer of a preset folder.

    Args:
        folder: the verified preset folder.
        format: the manifest's: "gguf" (one .gguf file in the folder), "keras" (a keras-hub preset) or "safetensors" (a
            Hugging Face folder).

    Raises:
        StageError: the folder has no vocabulary, or more than one .gguf file.
    """
    if format == "gguf":
        from stages.core.gguf import tokenizer_proto

        files = sorted(folder.glob("*.gguf"))
        if len(files) != 1:
            raise StageError(f"The preset folder must hold one .gguf file. Received: {len(files)} in {folder}")
        return Tokenizer.from_proto(tokenizer_proto(files[0]))
    name, kind = {
        "keras": (KERAS_VOCABULARY, "A keras-hub preset"),
        "safetensors": (HUGGING_FACE_VOCABULARY, "A Hugging Face folder"),
    }[format]
    try:
        return Tokenizer.from_proto((folder / name).read_bytes())
    except FileNotFoundError as error:
        raise StageError(f"{kind} must hold {name}. Received: folder={folder}") from error
