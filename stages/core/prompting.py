"""Prompts as token ids, as they stand or in Gemma's turn format, and the tokens that end a text.

Purpose: `generate` and the samples of `finetune` put prompts the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

from stages.core.control_tokens import ControlTokens
from stages.core.tokenizer import Tokenizer
from stages.core.turns import Turns


def encode(tokenizer: Tokenizer, prompts: Sequence[str], *, turns: bool) -> tuple[list[list[int]], tuple[int, ...]]:
    """Return the token ids of each prompt, BOS first, and the ids that end its continuation.

    Args:
        tokenizer: of the preset.
        prompts: the texts.
        turns: put each in the turn format, where `<end_of_turn>` ends a text too.

    Raises:
        StageError: the vocabulary has no turn format.
    """
    if not turns:
        return [[tokenizer.bos, *ids] for ids in ControlTokens(tokenizer).as_text(prompts)], (tokenizer.eos,)
    form = Turns(tokenizer)
    return form.prompts(prompts), (tokenizer.eos, form.end)
