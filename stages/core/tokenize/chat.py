"""Gemma's chat template, in which instruct presets were trained, as token ids.

Purpose: a prompt to continue, or prompts and responses to train on, are laid out as

    <bos><start_of_turn>user
    {prompt}<end_of_turn>
    <start_of_turn>model
    {response}<end_of_turn>

(https://ai.google.dev/gemma/docs/core/prompt-structure), the texts stripped of white space at both ends, as in Gemma's
chat template at Hugging Face. In a conversation a line break and the next turns follow; at the end, where no token to
train on follows the template's line break, it is omitted. The control tokens are inserted by id: a text that spells
one cannot end or begin a turn.

Gemma 4's turns are the same between `<|turn>` and `<turn|>`, but a system's text has a turn of its own, which begins
with `<|think|>` where the model is to think before it answers. Where it is not, the larger models' template opens their
answer with an empty thought, `<|channel>thought`, a line break and `<channel|>`. Here every answer follows one, also
those to train on and the earlier ones of a conversation, so that training and prompting agree; Google's template
leaves it out of the earlier ones. Source: the template of google/gemma-4-31B-it;
tests/tokenize/test_turns_of_gemma4.py has what it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.core.common.errors import ParamsError, StageError
from stages.core.presets.tokenizer import TURNS, TURNS_OF_GEMMA4, Tokenizer
from stages.core.tokenize.control_tokens import ControlTokens

THINK, TOOL_RESPONSE = "<|think|>", "<|tool_response>"
CHANNEL, CHANNEL_END = "<|channel>", "<channel|>"


@dataclass(frozen=True)
class Turns:
    """The control pieces of a chat template.

    Attributes:
        start, end: of each turn.
        others: what else the template needs.
        stop: besides the end of a turn, what ends a generation: where a tool would answer.
    """

    start: str
    end: str
    others: tuple[str, ...] = ()
    stop: str | None = None


GEMMA = Turns(TURNS, "<end_of_turn>")
GEMMA4 = Turns(TURNS_OF_GEMMA4, "<turn|>", (THINK, CHANNEL, CHANNEL_END, TOOL_RESPONSE), TOOL_RESPONSE)


def turns_of(tokenizer: Tokenizer) -> Turns:
    """Return the pieces of the template that a vocabulary is for."""
    theirs = tokenizer.piece_id(GEMMA.start) is None and tokenizer.piece_id(GEMMA4.start) is not None
    return GEMMA4 if theirs else GEMMA


def stops_of(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end a generation in turns: `<eos>`, the end of a turn and the template's own stop."""
    turns = turns_of(tokenizer)
    found = [tokenizer.piece_id(piece) for piece in (turns.end, turns.stop) if piece is not None]
    return [tokenizer.eos, *(number for number in found if number is not None)]


class ChatTemplate:
    """The chat template with a vocabulary.

    Attributes:
        end: id of the piece that ends a response.
        stops: ids that end a generation.
    """

    def __init__(self, tokenizer: Tokenizer, *, empty_thought: bool = False, thinking: bool = False) -> None:
        """Look the control pieces up by name: their ids differ between the families.

        Args:
            tokenizer: of the preset.
            empty_thought: whether the model answers after an empty thought, see `Architecture.empty_thought`.
            thinking: the model is to think before it answers.

        Raises:
            StageError: the vocabulary lacks one.
            ParamsError: the model is to think, and is no Gemma 4.
        """
        turns = GEMMA4 if empty_thought else turns_of(tokenizer)
        if thinking and turns is not GEMMA4:
            raise ParamsError(
                "generate.thinking must be false but for a Gemma 4: no other Gemma thinks. Received: true"
            )
        self._tokenizer, self._has_system = tokenizer, turns is GEMMA4
        pieces = (turns.start, turns.end, *turns.others)
        ids = {piece: number for piece in pieces if (number := tokenizer.piece_id(piece)) is not None}
        for piece in pieces:
            if piece not in ids:
                raise StageError(
                    f"Gemma's chat template needs a vocabulary with the piece {piece}. Received: "
                    f"{tokenizer.vocabulary_size} other pieces\nTake an instruct preset, or data with one text per row "
                    "(prepare.prompt_column: null) and generate.chat_template: false."
                )
        self._start, self.end = ids[turns.start], ids[turns.end]
        self.stops = tuple(stops_of(tokenizer))
        self._encode = ControlTokens(tokenizer).as_text
        self._line_break, self._model = tokenizer.encode("\n"), tokenizer.encode("model\n")
        self._think = [ids[THINK]] if thinking else []
        self._channel = (ids[CHANNEL], ids[CHANNEL_END]) if thinking else None
        if empty_thought and not thinking:
            self._model += [ids[CHANNEL], *tokenizer.encode("thought\n"), ids[CHANNEL_END]]

    def conversations(
        self, texts: Sequence[Sequence[str]], systems: Sequence[str | None] | None = None
    ) -> list[list[list[int]]]:
        """Return the ids of each turn of conversations, of which each is prompts and responses in turn.

        Args:
            texts: of each conversation its turns.
            systems: of each the system's text, which is part of the first turn; None: none has one.
        """
        first = iter(self.prompts([each[0] for each in texts], systems))
        later = iter(self.later_prompts([text for each in texts for text in each[2::2]]))
        responses = iter(self.responses([text for each in texts for text in each[1::2]]))
        return [
            [next(responses if place % 2 else later if place else first) for place in range(len(each))]
            for each in texts
        ]

    def prompts(self, texts: Sequence[str], systems: Sequence[str | None] | None = None) -> list[list[int]]:
        """Return each text as the user's turn, up to where the model's response begins; BOS is the first id.

        Args:
            texts: the prompts.
            systems: of each the system's text. Before Gemma 4 it begins the user's turn, a blank line after it.
        """
        said = [(system or "").strip() for system in systems or [None] * len(texts)]
        if not self._has_system:
            joined = [f"{system}\n\n{text}" if system else text for system, text in zip(said, texts, strict=True)]
            return [[self._tokenizer.bos, *ids] for ids in self._prompts(joined)]
        pairs = zip(self._systems(said), self._prompts(texts), strict=True)
        return [[self._tokenizer.bos, *system, *ids] for system, ids in pairs]

    def later_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text as the user's turn after a response, with the line break that comes between the two."""
        return [[*self._line_break, *ids] for ids in self._prompts(texts)]

    def _systems(self, texts: Sequence[str]) -> list[list[int]]:
        """Return Gemma 4's system turn for each text; none where it would be empty."""
        name = self._tokenizer.encode("system\n")
        if self._think:
            begun = [*name, *self._think]
            inner = [[*begun, *ids] for ids in self._encode([f"\n{text}" for text in texts])]
        else:
            encoded = self._encode([f"system\n{text}" for text in texts])
            inner = [ids if text else [] for text, ids in zip(texts, encoded, strict=True)]
        return [[self._start, *ids, self.end, *self._line_break] if ids else [] for ids in inner]

    def _prompts(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            [self._start, *ids, self.end, *self._line_break, self._start, *self._model]
            for ids in self._encode([f"user\n{text.strip()}" for text in texts])
        ]

    def responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text as the rest of the model's turn, to follow its prompt's ids; the turn's end is the last."""
        return [[*ids, self.end] for ids in self._encode([text.strip() for text in texts])]

    def answered(self, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
        """Return a prompt with the answer that the model gave it, to continue; thoughts are left out, as in Gemma's.

        Args:
            prompt: as of `prompts`, or with earlier turns before it.
            answer: what the model wrote, without the piece that ended it.
        """
        kept: list[int] = []
        inside = False
        for number in answer:
            if self._channel and number in self._channel:
                inside = number == self._channel[0]
            elif not inside:
                kept.append(number)
        return [*prompt, *kept, self.end]
