"""Texts while they grow: what is shown is what is kept, and nothing is shown that may yet change."""

from __future__ import annotations

import pytest

from stages.core.generate.texts import InOrder, Texts, visible
from stages.core.presets.tokenizer import Tokenizer
from tests.support.tiny_presets import tiny_proto


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_proto(tiny_proto())


def grown(tokenizer, text, stop_strings=(), ended=True):
    """A text given a token at a time: the pieces shown, the text kept, and the tokens that were taken."""
    shown = []
    texts = Texts(tokenizer, 1, stop_strings, lambda row, piece, end: shown.append(piece))
    ids = tokenizer.encode(text)
    for place, number in enumerate(ids):
        if texts(0, [number], ended and place == len(ids) - 1):
            return shown, texts.texts[0], place + 1
    return shown, texts.texts[0], len(ids)


def test_a_character_of_several_tokens_is_shown_once_it_is_whole(tokenizer):
    text = "I saw \u65e5\u672c and \U0001f3ac twice"
    assert len(tokenizer.encode("\U0001f3ac")) == 4
    shown, kept, _ = grown(tokenizer, text)
    assert "".join(shown) == kept == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown)


def test_bytes_that_are_no_character_are_shown_at_the_end(tokenizer):
    ids = [*tokenizer.encode("so"), tokenizer.encode("\U0001f3ac")[0]]
    texts = Texts(tokenizer, 1)
    assert not texts(0, ids, False)
    assert texts.texts == ["so"]
    texts(0, [], True)
    assert texts.texts == ["so\N{REPLACEMENT CHARACTER}"]


def test_a_text_ends_before_the_first_stop_string_and_nothing_of_it_is_shown(tokenizer):
    text = "one two. three two four"
    shown, kept, taken = grown(tokenizer, text, ("four", "two. t", "never"))
    assert "".join(shown) == kept == "one "
    assert taken < len(tokenizer.encode(text))


def test_what_only_begins_like_a_stop_string_is_shown_when_that_is_known(tokenizer):
    shown, kept, _ = grown(tokenizer, "one two. And so", ("two. Or",))
    assert "".join(shown) == kept == "one two. And so"
    held, _, _ = grown(tokenizer, "one two. ", ("two. Or",), ended=False)
    assert "".join(held) == "one "
    # At the end nothing can follow.
    assert grown(tokenizer, "one two. ", ("two. Or",))[1] == "one two. "


def test_rows_that_grow_together_are_written_one_after_the_other():
    written = []
    order = InOrder(["A", "B", "C"], written.append)
    order(1, " second", False)
    assert "".join(written) == "A"
    order(0, " first", False)
    order(2, " third", True)
    order(0, " more", True)
    assert "".join(written) == "A first more\n\nB second"
    order(1, "", True)
    assert "".join(written) == "A first more\n\nB second\n\nC third\n\n"


def test_a_terminal_is_given_lines_and_nothing_to_obey():
    assert visible("a\n\tb \u00e9\U0001f3ac") == "a\n\tb \u00e9\U0001f3ac"
    assert visible("\x1b[2J\r\x07\u202e\x9b") == "\\x1b[2J\\r\\x07\\u202e\\x9b"
