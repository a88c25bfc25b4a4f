"""Tasks of EleutherAI's lm-evaluation-harness, answered by this project's model.

Purpose: any task of the harness as a measure beside the loss: it makes the questions and judges the answers, and asks
for three things: likelihoods of continuations, likelihoods of whole texts, and texts. Texts are tokenized as its own
models for transformers do it, control tokens that are spelled out as text; each sequence begins with BOS.
Source: the docstrings of `lm_eval.api.model.LM` of version 0.4.13.
"""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from stages.core.common.errors import StageError, shown, shown_list
from stages.core.evaluate.review_losses import ReviewLosses
from stages.core.generate.choosing import Drawing
from stages.core.generate.sampling import Sampler, SamplerSettings
from stages.core.generate.texts import Texts
from stages.core.model.causal_lm import CausalModel
from stages.core.presets.tokenizer import Tokenizer
from stages.core.tokenize.control_tokens import ControlTokens
from stages.core.tokenize.held_out import HeldOut, of_pairs

logger = logging.getLogger(__name__)

# New tokens of a text where a task names no number, as for the harness' own models.
MOST_TOKENS = 256
COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
Pair = tuple[list[int], list[int]]


def load_tasks(names: Sequence[str | dict[str, Any]]) -> Callable[..., dict[str, dict[str, float]]]:
    """Load tasks with their data, and return what asks a model: `HarnessModel`'s arguments and a limit.

    Args:
        names: of tasks, groups or tags, as `lm-eval ls tasks` lists them; or a task's own configuration.

    Raises:
        StageError: there is no such task, or its data cannot be had.
    """
    logger.info(f"Loading {len(names)} tasks of the lm-evaluation-harness and their data ...")
    manager = TaskManager()
    if unknown := [each for each in names if isinstance(each, str) and each not in manager.all_tasks]:
        raise StageError(
            "evaluate.tasks must name tasks of the lm-evaluation-harness, which `lm-eval ls tasks` lists. Received: "
            f"{shown_list(unknown)}"
        )
    try:
        loaded = manager.load(list(names))
    # Whatever a task's own code and the libraries that download its data raise.
    except Exception as error:
        raise StageError(
            f"The tasks' data must be at hand, or to be had from their hub. Received: {type(error).__name__}: "
            f"{shown(error)}\nLook at the network, or take the task out of evaluate.tasks."
        ) from error
    within = {child for children in loaded["group_map"].values() for child in children}
    every = {**loaded["groups"], **loaded["tasks"]}
    outermost = [each for name, each in every.items() if name not in within]

    def scores(
        model: CausalModel,
        tokenizer: Tokenizer,
        measured: Callable[[HeldOut], ReviewLosses],
        max_length: int,
        limit: int | None,
    ) -> dict[str, dict[str, float]]:
        answering = HarnessModel(model, tokenizer, measured, max_length)
        found = simple_evaluate(
            answering, tasks=outermost, task_manager=manager, limit=limit, log_samples=False, torch_random_seed=None
        )
        return {task: numbers(values) for task, values in found["results"].items()}

    return scores


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a task's result, rounded; `acc,none` is called acc, `acc,strict` acc (strict)."""
    found = {}
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if kind and isinstance(value, int | float) and math.isfinite(value):
            found[metric if kind == "none" else f"{metric} ({kind})"] = round(float(value), 5)
    return found


class HarnessModel(LM):
    """The model as the harness asks it; `args` of a request are the strings that each method names."""

    def __init__(
        self,
        model: CausalModel,
        tokenizer: Tokenizer,
        measured: Callable[[HeldOut], ReviewLosses],
        max_length: int,
    ) -> None:
        """Take what answers; nothing is compiled yet.

        Args:
            model: to write texts with.
            tokenizer: of its preset.
            measured: returns the losses of sequences of at most `max_length` inputs.
            max_length: of a longer context the end is read.
        """
        super().__init__()
        self._sampler, self._tokenizer = Sampler(model), tokenizer
        self._measured, self._max_length = measured, max_length
        self._as_text = ControlTokens(tokenizer).as_text

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) the continuation's log-likelihood, and whether it is the likeliest.

        As by the harness' own models, spaces at the end of a context are the continuation's, and its tokens are those
        of both together that follow the context's.
        """
        contexts, continuations = [], []
        for context, continuation in (request.args for request in requests):
            bare = context.rstrip()
            contexts.append(bare)
            continuations.append(context[len(bare) :] + continuation)
        together = self._as_text([a + b for a, b in zip(contexts, continuations, strict=True)])
        alone = self._as_text(contexts)
        pairs = [self._pair(each, len(context)) for each, context in zip(together, alone, strict=True)]
        losses = self._measured(of_pairs(pairs))
        found = zip(losses.loss.tolist(), losses.correct.tolist(), losses.targets.tolist(), strict=True)
        return [(-loss, correct == targets) for loss, correct, targets in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return the log-likelihood of each whole text, (text,).

        A longer text is read in pieces that predict each token once, each with as many tokens before as fit.
        """
        pairs: list[Pair] = []
        owners = []
        for number, ids in enumerate(self._as_text([request.args[0] for request in requests])):
            pieces = windows([self._tokenizer.bos, *ids], self._max_length)
            pairs += pieces
            owners += [number] * len(pieces)
        totals = [0.0] * len(requests)
        for number, loss in zip(owners, self._measured(of_pairs(pairs)).loss.tolist() if pairs else [], strict=True):
            totals[number] -= loss
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return a continuation of each (context, settings), up to the first of the strings in `until`."""
        alike = defaultdict(list)
        for number, (_, settings) in enumerate(request.args for request in requests):
            alike[json.dumps(settings, sort_keys=True)].append(number)
        texts = [""] * len(requests)
        for written, numbers_of in alike.items():
            found = self._texts([requests[number].args[0] for number in numbers_of], json.loads(written))
            for number, text in zip(numbers_of, found, strict=True):
                texts[number] = text
        return texts

    def _pair(self, ids: list[int], context: int) -> Pair:
        """Return context and continuation, BOS first, of which the former is shortened from its beginning."""
        # Where the continuation became one token with the end of the context, that token is measured.
        context = max(0, min(context, len(ids) - 1))
        room = max(0, self._max_length - (len(ids) - context))
        return [self._tokenizer.bos, *ids[max(0, context - room) : context]], ids[context:][: self._max_length]

    def _texts(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """Continue contexts that have the same settings."""
        most = next((int(settings[key]) for key in COUNTS if settings.get(key) is not None), MOST_TOKENS)
        until = settings.get("until") or []
        stops = [each for each in ([until] if isinstance(until, str) else until) if each]
        drawing = Drawing()
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            drawing = Drawing(settings.get("temperature", 1.0), settings.get("top_k"), settings.get("top_p"))
        room = max(1, self._max_length - most)
        prompts = [[self._tokenizer.bos, *ids[-room:]] for ids in self._as_text(contexts)]
        # Rows are written together: those of one length have no padding.
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        texts = Texts(self._tokenizer, len(prompts), stops)
        wanted = SamplerSettings(most, (self._tokenizer.eos,), drawing, self._tokenizer.vocabulary_size)
        self._sampler([prompts[number] for number in order], wanted, listen=texts)
        return [text for _, text in sorted(zip(order, texts.texts, strict=True))]


def windows(ids: Sequence[int], max_length: int) -> list[Pair]:
    """Return pieces of a text as context and what is predicted: all tokens but the first, each once.

    Args:
        ids: tokens of the text.
        max_length: inputs of a piece, that is all of its tokens but the last.

    Example:
        >>> windows([0, 1, 2, 3, 4, 5], 3)
        [([0], [1, 2, 3]), ([2, 3], [4, 5])]
    """
    pieces = []
    for start in range(1, len(ids), max_length):
        end = min(start + max_length, len(ids))
        pieces.append((list(ids[max(0, end - 1 - max_length) : start]), list(ids[start:end])))
    return pieces
