"""Text to token ids and back, by the SentencePiece library, or the tokenizers library for a `tokenizer.json`.

Purpose: the same ids as keras-hub's and transformers' tokenizers give, without importing TensorFlow (4 s) as those do.
Reads: a preset folder: the .gguf file's tokenizer, `assets/tokenizer/vocabulary.spm`, `tokenizer.json`, or
`tokenizer.model`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from stages.core.common.errors import StageError, shown
from stages.core.presets.untrusted import read_object

KERAS_VOCABULARY = "assets/tokenizer/vocabulary.spm"
"""Where keras-hub's `save_to_preset` puts the SentencePiece model, below the preset's folder."""

HUGGING_FACE_VOCABULARY = "tokenizer.model"
"""Where Hugging Face folders of Gemma have it, those of transformers 5 no longer."""

JSON_VOCABULARY = "tokenizer.json"
"""What transformers reads where it is there: it knows the tokens that a fine-tuning added."""

ADDED_TOKENS = "added_tokens.json"
"""Tokens that a `tokenizer.model` lacks, by their ids."""

CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>")
"""Pieces that no text spells: SentencePiece finds them in none, so neither does the other library."""

IMAGE = "<image_soft_token>"
"""Stands for a part of an image in every Gemma 3, beyond the rows of a text model's table: no text spells it."""


def vocabulary_files(folder: Path, file_format: str) -> list[str]:
    """Return the names of the files that `load_tokenizer` reads in a `keras` or `safetensors` folder."""
    if file_format == "keras":
        return [KERAS_VOCABULARY]
    if (folder / JSON_VOCABULARY).is_file():
        return [JSON_VOCABULARY]
    return [HUGGING_FACE_VOCABULARY, *([ADDED_TOKENS] if (folder / ADDED_TOKENS).is_file() else [])]


def holds_vocabulary(name: str) -> bool:
    """Return whether a preset's file, by its name below the preset's folder, is what `load_tokenizer` reads."""
    names = (KERAS_VOCABULARY, HUGGING_FACE_VOCABULARY, JSON_VOCABULARY, ADDED_TOKENS)
    return name in names or name.endswith(".gguf")


class _JsonProcessor:
    """A `tokenizer.json` behind the methods of a SentencePieceProcessor that are used here."""

    def __init__(self, content: dict[str, Any]) -> None:
        """Read the file's content.

        Raises:
            StageError: the tokenizers library cannot read it, or gives a token another id than the file says.
        """
        from tokenizers import Tokenizer as Library

        try:
            words, added = content["model"]["vocab"], content.get("added_tokens") or []
            stated = {token["content"]: token["id"] for token in added}
            kept = []
            for token in added:
                if token["content"] not in (*CONTROL, IMAGE):
                    kept.append(token)
                elif token["content"] not in words:
                    # The library counts on: a token that went would give its id to the next.
                    kept.append({**token, "content": f"\ue000{token['content']}"})
            self._library = Library.from_str(json.dumps({**content, "added_tokens": kept}))
            self._library.no_truncation()
            self._library.no_padding()
            self._controls = {self._library.token_to_id(piece) for piece in CONTROL[:3]}
            known = self._library.get_vocab(with_added_tokens=True)
            self._size = 1 + max(number for word, number in known.items() if IMAGE not in word)
            differing = [token["content"] for token in kept if known[token["content"]] != token["id"]]
        except Exception as error:  # the library raises plain Exception
            raise StageError(
                f"The vocabulary must be a tokenizer.json as transformers writes it. Received: {shown(error)}"
            ) from error
        if differing:
            raise StageError(
                "Each added token of tokenizer.json must follow the one before it. "
                f"Received: {shown(differing[0])} with the id {stated.get(differing[0])}"
            )

    def vocab_size(self) -> int:
        return self._size

    def piece_to_id(self, piece: str) -> int:
        return -1 if (number := self._library.token_to_id(piece)) is None else number

    def id_to_piece(self, number: int) -> str | None:
        return None if number < 0 else self._library.id_to_token(number)

    def encode(self, text: str | list[str], num_threads: int = 1) -> Any:
        if isinstance(text, str):
            return self._library.encode(text, add_special_tokens=False).ids
        return [each.ids for each in self._library.encode_batch(text, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._library.decode(
            [number for number in ids if number not in self._controls], skip_special_tokens=False
        )


class Tokenizer:
    """A Gemma tokenizer.

    Attributes:
        pad, eos, bos: ids of the special tokens; in every Gemma 0, 1 and 2.
        vocabulary_size: number of pieces; the model's embedding may have more rows.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor | _JsonProcessor) -> None:
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
        named = ((self._processor.id_to_piece(number), number) for number in range(self.vocabulary_size))
        return ((piece, number) for piece, number in named if isinstance(piece, str))

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
        from stages.core.presets.gguf import tokenizer_proto

        files = sorted(folder.glob("*.gguf"))
        if len(files) != 1:
            raise StageError(f"The preset folder must hold one .gguf file. Received: {len(files)} in {folder}")
        return Tokenizer.from_proto(tokenizer_proto(files[0]))
    name, *more = vocabulary_files(folder, format)
    kind = "A keras-hub preset" if format == "keras" else "A Hugging Face folder"
    if name == JSON_VOCABULARY:
        return Tokenizer(_JsonProcessor(read_object(folder / name)))
    try:
        tokenizer = Tokenizer.from_proto((folder / name).read_bytes())
    except OSError as error:
        raise StageError(f"{kind} must hold {name}. Received: folder={folder} ({error.strerror})") from error
    added = {piece for file in more for piece in read_object(folder / file)} - {IMAGE}
    if unknown := sorted(piece for piece in added if tokenizer.piece_id(piece) is None):
        raise StageError(
            f"The vocabulary must hold the tokens that {ADDED_TOKENS} adds, and {name} does not. "
            f"Received: {shown(unknown[0])} in {folder}\n"
            f"Save the tokenizer with transformers' fast one, which writes {JSON_VOCABULARY}."
        )
    return tokenizer
