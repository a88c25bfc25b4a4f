"""Prompts as token ids, plain or in Gemma's chat template, and the tokens that end a text.

Purpose: `generate` and the samples of `finetune` encode prompts the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from stages.core.presets.tokenizer import Tokenizer
from stages.core.tokenize.chat import ChatTemplate, turns_of
from stages.core.tokenize.control_tokens import ControlTokens

logger = logging.getLogger(__name__)


def encode(
    tokenizer: Tokenizer, prompts: Sequence[str], template: ChatTemplate | None, system: str | None = None
) -> tuple[list[list[int]], tuple[int, ...]]:
    """Return the token ids of each prompt, BOS first, and the ids that end its continuation.

    Args:
        tokenizer: of the preset.
        prompts: the texts.
        template: to put them in, in which the end of a turn ends a text too; None: they are continued as they are.
        system: what the template's system says before each.
    """
    if template is None:
        return [[tokenizer.bos, *ids] for ids in ControlTokens(tokenizer).as_text(prompts)], (tokenizer.eos,)
    return template.prompts(prompts, [system] * len(prompts)), template.stops


def warn_of_another_format(tokenizer: Tokenizer, trained: Mapping[str, np.ndarray], *, chat_template: bool) -> None:
    """Warn if the training data are in Gemma's chat template and the prompts are not.

    Args:
        tokenizer: of the preset.
        trained: the arrays of the training sequences, see `stages.core.tokenize.packing`; they are in the chat template
            if the end of a turn is one of the targets trained on.
        chat_template: `generate.chat_template`.
    """
    end = tokenizer.piece_id(turns_of(tokenizer).end)
    if not chat_template and ((trained["target_ids"] == end) & (trained["weights"] > 0)).any():
        logger.warning(
            "the training data are in Gemma's chat template, and with generate.chat_template: false the prompts are "
            "not. Set generate.chat_template: true, or the model is prompted in a format it was not trained on."
        )
