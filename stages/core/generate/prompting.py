"""Prompts as token ids, as they stand or in Gemma's turn format, and the tokens that end a text.

Purpose: `generate` and the samples of `finetune` put prompts the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from stages.core.presets.tokenizer import Tokenizer
from stages.core.tokenize.chat import END, Turns
from stages.core.tokenize.control_tokens import ControlTokens

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)


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


def warn_of_another_format(tokenizer: Tokenizer, trained: Mapping[str, np.ndarray], *, turns: bool) -> None:
    """Say so where the training data are in Gemma's turn format and the prompts are not put in it.

    Args:
        tokenizer: of the preset.
        trained: the arrays of the training sequences, see `stages.core.tokenize.packing`; they are in the turn format
        if
            `<end_of_turn>` is one of the targets trained on.
        turns: as for `encode`.
    """
    if not turns and ((trained["target_ids"] == tokenizer.piece_id(END)) & (trained["weights"] > 0)).any():
        logger.warning(
            "the training data are in Gemma's turn format, and with generate.turns: false no prompt is put "
            "in it. Set generate.turns: true, or the outputs are not what was trained."
        )
