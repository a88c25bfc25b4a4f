"""The tokenizer of a Hugging Face folder: `tokenizer.json` by the tokenizers library, or else `tokenizer.model`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Library

from stages.core.common.errors import StageError, shown
from stages.core.presets.tokenizer import ADDED_TOKENS, HUGGING_FACE_VOCABULARY, IMAGE, JSON_VOCABULARY, Tokenizer
from stages.core.presets.untrusted import read_object

CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>")
"""Pieces that no text spells: SentencePiece finds them in none, so neither does the other library."""


def vocabulary_files(folder: Path) -> list[str]:
    """Return the names of the files that `load_tokenizer` reads."""
    if (folder / JSON_VOCABULARY).is_file():
        return [JSON_VOCABULARY]
    return [HUGGING_FACE_VOCABULARY, *([ADDED_TOKENS] if (folder / ADDED_TOKENS).is_file() else [])]


def own_template(folder: Path) -> str:
    """Return the text of a folder's chat template, of several all; nothing where it has none.

    Raises:
        StageError: a file of it cannot be read.
    """
    try:
        texts = [path.read_text("utf-8") for path in [folder / "chat_template.jinja"] if path.is_file()]
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(f"A chat template must be text. Received: {shown(error)} in {folder}") from error
    path = folder / "tokenizer_config.json"
    stated = read_object(path).get("chat_template") if path.is_file() else None
    named = stated if isinstance(stated, list) else [stated]
    stated_texts = (each.get("template") if isinstance(each, dict) else each for each in named)
    return "\n".join([*texts, *(text for text in stated_texts if isinstance(text, str))])


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder.

    Raises:
        StageError: the folder has no vocabulary, or one that lacks a token.
    """
    name, *more = vocabulary_files(folder)
    if name == JSON_VOCABULARY:
        return Tokenizer(_JsonProcessor(read_object(folder / name)))
    tokenizer = Tokenizer.from_file(folder, name, "A Hugging Face folder")
    added = {piece for file in more for piece in read_object(folder / file)} - {IMAGE}
    if unknown := sorted(piece for piece in added if tokenizer.piece_id(piece) is None):
        raise StageError(
            f"The vocabulary must hold the tokens that {ADDED_TOKENS} adds, and {name} does not. "
            f"Received: {shown(unknown[0])} in {folder}\n"
            f"Save the tokenizer with transformers' fast one, which writes {JSON_VOCABULARY}."
        )
    return tokenizer


class _JsonProcessor:
    """A `tokenizer.json` behind the methods of a SentencePieceProcessor that are used here."""

    def __init__(self, content: dict[str, Any]) -> None:
        """Read the file's content.

        Raises:
            StageError: the tokenizers library cannot read it, or gives a token another id than the file says.
        """
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
