"""Gemma's chat template, in which instruct presets were trained, as token ids.

Purpose: a prompt to continue, or prompts and responses to train on, are laid out as

    <bos><start_of_turn>user
    {prompt}<end_of_turn>
    <start_of_turn>model
    {response}<end_of_turn>

(https://ai.google.dev/gemma/docs/core/prompt-structure), the texts stripped of white space at both ends, as in Gemma's
chat template at Hugging Face. In a conversation a line break and the next turns follow; at the end, where no token to
train on follows the template's line break, it is omitted. The two control tokens are inserted by id: a text that spells
one cannot end or begin a turn.
"""

from __future__ import annotations

from collections.abc import Sequence

from stages.core.common.errors import StageError
from stages.core.presets.tokenizer import Tokenizer
from stages.core.tokenize.control_tokens import ControlTokens

START, END = "<start_of_turn>", "<end_of_turn>"


class ChatTemplate:
    """The chat template with a vocabulary.

    Attributes:
        end: id of `<end_of_turn>`, which ends a response.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Look the control pieces up by name: their ids differ between the families.

        Raises:
            StageError: the vocabulary lacks one.
        """
        self._tokenizer = tokenizer
        ids = {piece: number for piece in (START, END) if (number := tokenizer.piece_id(piece)) is not None}
        for piece in (START, END):
            if piece not in ids:
                raise StageError(
                    f"Gemma's chat template needs a vocabulary with the piece {piece}. Received: "
                    f"{tokenizer.vocabulary_size} other pieces\nTake an instruct preset, or data with one text per row "
                    "(prepare.prompt_column: null) and generate.chat_template: false."
                )
        self._start, self.end = ids[START], ids[END]
        self._encode = ControlTokens(tokenizer).as_text
        self._line_break, self._model = tokenizer.encode("\n"), tokenizer.encode("model\n")

    def conversations(self, texts: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Return the ids of each turn of conversations, of which each is prompts and responses in turn."""
        first = iter(self.prompts([each[0] for each in texts]))
        later = iter(self.later_prompts([text for each in texts for text in each[2::2]]))
        responses = iter(self.responses([text for each in texts for text in each[1::2]]))
        return [
            [next(responses if place % 2 else later if place else first) for place in range(len(each))]
            for each in texts
        ]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text as the user's turn, up to where the model's response begins; BOS is the first id."""
        return [[self._tokenizer.bos, *ids] for ids in self._prompts(texts)]

    def later_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text as the user's turn after a response, with the line break that comes between the two."""
        return [[*self._line_break, *ids] for ids in self._prompts(texts)]

    def _prompts(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            [self._start, *ids, self.end, *self._line_break, self._start, *self._model]
            for ids in self._encode([f"user\n{text.strip()}" for text in texts])
        ]

    def responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text as the rest of the model's turn, to follow its prompt's ids; `<end_of_turn>` is the last."""
        return [[*ids, self.end] for ids in self._encode([text.strip() for text in texts])]
