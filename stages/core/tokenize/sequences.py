"""Turns a Parquet file of reviews, or of pairs of prompt and response, into sequences, and counts their tokens.

Purpose: the steps of `stages/tokenize.py`. The file's columns show which of the two it holds.
Reads: `data/imdb/*.parquet`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyarrow import parquet

from stages.core.common.errors import StageError
from stages.core.config.schema import Tokenize
from stages.core.presets.tokenizer import Tokenizer
from stages.core.tokenize import held_out, packing, pair_packing
from stages.core.tokenize.chat import ChatTemplate
from stages.core.tokenize.control_tokens import ControlTokens


@dataclass(frozen=True)
class LaidOut:
    """A tokenized split.

    Attributes:
        sequences: for training.
        whole: the same reviews untruncated, for `evaluate`.
        counts: for the metrics.
        cut_by_truncation_fraction: the share of tokens that one sequence per review would discard.
        summary: one line for the log.
    """

    sequences: packing.Sequences
    whole: held_out.HeldOut
    counts: dict[str, int | float]
    cut_by_truncation_fraction: float
    summary: str


def holds_pairs(source: Path) -> bool:
    """Return whether a Parquet file holds pairs of prompt and response, and not single texts."""
    return "prompt" in parquet.read_schema(source).names


def lay_out(
    source: Path, split: str, tokenizer: Tokenizer, settings: Tokenize, *, empty_thought: bool = False
) -> LaidOut:
    """Turn a split into sequences.

    Args:
        source: the Parquet file.
        split: its name, for messages.
        tokenizer: of the preset.
        settings: the section `tokenize`.
        empty_thought: as for `ChatTemplate`.

    Raises:
        StageError: there is no token to train on, or the data are pairs and the vocabulary has no chat template.
    """
    if holds_pairs(source):
        return _pairs(source, split, tokenizer, settings, ChatTemplate(tokenizer, empty_thought=empty_thought))
    texts = parquet.read_table(source, columns=["text"])["text"].to_pylist()
    control = ControlTokens(tokenizer)
    spelled = control.spelled_in(texts)
    ends = settings.eos != "never"
    if settings.control_tokens == "tokens":
        # The two that every review gets are not put there twice.
        reviews = [ids[ids[:1] == [tokenizer.bos] :] for ids in control.as_tokens(texts)]
        reviews = [ids[:-1] if ends and ids[-1:] == [tokenizer.eos] else ids for ids in reviews]
    else:
        reviews = control.as_text(texts)
    bos, eos, pad = tokenizer.bos, tokenizer.eos if ends else None, tokenizer.pad
    if settings.packing:
        laid_out = packing.pack(reviews, settings.length, bos=bos, eos=eos, pad=pad)
    else:
        after_cut = settings.eos == "always"
        laid_out = packing.one_per_review(reviews, settings.length, bos=bos, eos=eos, pad=pad, eos_after_cut=after_cut)
    counts = packing.sequence_metrics(laid_out, reviews, eos=ends) | {"control_tokens_spelled": spelled}
    if not counts["tokens_kept"]:
        raise StageError(f"The {split} reviews must have at least one token. Received: {len(reviews)} reviews, none")
    return LaidOut(
        laid_out,
        held_out.of_reviews(reviews, bos=bos, eos=eos),
        counts,
        packing.cut_by_truncation_fraction(reviews, settings.length, eos=ends),
        f"{split}: {counts['reviews']:,} reviews in {counts['sequences']:,} sequences of {settings.length} tokens, "
        f"{counts['filled_fraction']:.1%} filled, {counts['tokens_cut']:,} tokens cut"
        + _spelled_note(spelled, settings.control_tokens),
    )


def _pairs(source: Path, split: str, tokenizer: Tokenizer, settings: Tokenize, template: ChatTemplate) -> LaidOut:
    """Turn a split of pairs into sequences."""
    table = parquet.read_table(source)
    conversations = list(zip(table["prompt"].to_pylist(), table["response"].to_pylist(), strict=True))
    if "earlier" in table.column_names:
        earlier = table["earlier"].to_pylist()
        conversations = [(*before, *last) for before, last in zip(earlier, conversations, strict=True)]
    systems = table["system"].to_pylist() if "system" in table.column_names else None
    texts = [text for each in conversations for text in each] + [text for text in systems or [] if text]
    spelled = ControlTokens(tokenizer).spelled_in(texts)
    trimmed = sum(text != text.strip() for text in texts)
    pairs = template.conversations(conversations, systems)
    laid_out = pair_packing.lay_out(pairs, settings.length, packing=settings.packing, pad=tokenizer.pad)
    counts = pair_packing.pair_metrics(laid_out, pairs)
    counts |= {"control_tokens_spelled": spelled, "texts_trimmed": trimmed}
    if not counts["response_tokens"]:
        raise StageError(
            f"The {split} pairs must have a response token within a sequence of {settings.length} tokens. Received: "
            f"{len(pairs)} pairs, {counts['prompts_too_long']} with a prompt that fills it. "
            "Set a larger tokenize.length."
        )
    left_out = f", {counts['prompts_too_long']:,} pairs skipped, whose prompt alone fills a sequence"
    return LaidOut(
        laid_out,
        held_out.of_pairs(pairs),
        counts,
        round(counts["tokens_cut"] / (counts["tokens_cut"] + counts["tokens_kept"]), 6),
        f"{split}: {counts['reviews']:,} pairs in {counts['sequences']:,} sequences of {settings.length} tokens, "
        f"{counts['filled_fraction']:.1%} filled, {counts['response_tokens']:,} response tokens to train on, "
        f"{counts['tokens_cut']:,} tokens cut, {counts['pairs_cut']:,} pairs cut at their end"
        f"{left_out if counts['prompts_too_long'] else ''}"
        + (f"; {trimmed:,} texts without the white space at their ends, as in Gemma's chat template" if trimmed else "")
        + _spelled_note(spelled, "text"),
    )


def _spelled_note(spelled: int, control_tokens: str) -> str:
    """Describe the handling of texts that spell control tokens, if there are any."""
    return (
        f"; {spelled:,} texts spell control tokens such as <end_of_turn>: taken as {control_tokens}" if spelled else ""
    )
