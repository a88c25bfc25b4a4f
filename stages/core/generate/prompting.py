"""Prompts as token ids, plain or in Gemma's chat template, and the tokens that end a text.

Purpose: `generate` and the samples of `finetune` encode prompts the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from stages.core.presets.tokenizer import Tokenizer
from stages.core.tokenize.chat import END, ChatTemplate
from stages.core.tokenize.control_tokens import ControlTokens

logger = logging.getLogger(__name__)


def encode(
    tokenizer: Tokenizer, prompts: Sequence[str], *, chat_template: bool
) -> tuple[list[list[int]], tuple[int, ...]]:
    """Return the token ids of each prompt, BOS first, and the ids that end its continuation.

    Args:
        tokenizer: of the preset.
        prompts: the texts.
        chat_template: apply the chat template, in which `<end_of_turn>` ends a text too.

    Raises:
        StageError: the vocabulary has no chat template.
    """
    if not chat_template:
        return [[tokenizer.bos, *ids] for ids in ControlTokens(tokenizer).as_text(prompts)], (tokenizer.eos,)
    template = ChatTemplate(tokenizer)
    return template.prompts(prompts), (tokenizer.eos, template.end)


def warn_of_another_format(tokenizer: Tokenizer, trained: Mapping[str, np.ndarray], *, chat_template: bool) -> None:
    """Warn if the training data are in Gemma's chat template and the prompts are not.

    Args:
        tokenizer: of the preset.
        trained: the arrays of the training sequences, see `stages.core.tokenize.packing`; they are in the chat template
            if `<end_of_turn>` is one of the targets trained on.
        chat_template: as for `encode`.
    """
    if not chat_template and ((trained["target_ids"] == tokenizer.piece_id(END)) & (trained["weights"] > 0)).any():
        logger.warning(
            "the training data are in Gemma's chat template, and with generate.chat_template: false the prompts are "
            "not. Set generate.chat_template: true, or the model is prompted in a format it was not trained on."
        )
