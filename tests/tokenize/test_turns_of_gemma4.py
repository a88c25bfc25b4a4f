"""Gemma 4's turns as ids: what its own template gives, and the same to train on as to prompt with."""

from __future__ import annotations

import numpy as np
import pytest

from stages.core.common.errors import ParamsError, StageError
from stages.core.config.schema import Tokenize
from stages.core.generate import prompting
from stages.core.prepare.cleaning import Review
from stages.core.prepare.parquet_file import write_reviews
from stages.core.presets.tokenizer import Tokenizer
from stages.core.tokenize import sequences
from stages.core.tokenize.chat import ChatTemplate, stops_of
from tests.support.tiny_presets import TURNS_OF_GEMMA4, tiny_proto

TOKENIZER = Tokenizer.from_proto(tiny_proto(TURNS_OF_GEMMA4))
EARLIER = Tokenizer.from_proto(tiny_proto())
SETTINGS = Tokenize(length=128, packing=True, eos="end", control_tokens="text")
CONVERSATION = ("Name a film. ", "Heat.", "Another?", "Ran.\n")

# What the template of google/gemma-4-31B-it makes of (system, prompt) with `add_generation_prompt`, without and with
# `enable_thinking`; that of the E2B and E4B leaves the empty thought out.
THOUGHT = "<|channel>thought\n<channel|>"
TEMPLATE = {
    (None, " Name a film.\n"): (
        f"<bos><|turn>user\nName a film.<turn|>\n<|turn>model\n{THOUGHT}",
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nName a film.<turn|>\n<|turn>model\n",
    ),
    (" Be kind. ", "Name a film."): (
        f"<bos><|turn>system\nBe kind.<turn|>\n<|turn>user\nName a film.<turn|>\n<|turn>model\n{THOUGHT}",
        "<bos><|turn>system\n<|think|>\nBe kind.<turn|>\n<|turn>user\nName a film.<turn|>\n<|turn>model\n",
    ),
}
# Of a whole conversation. Of turns that have passed it leaves the empty thought out too.
WHOLE = (
    "<bos><|turn>user\nName a film.<turn|>\n<|turn>model\nHeat.<turn|>\n"
    "<|turn>user\nAnother?<turn|>\n<|turn>model\nRan.<turn|>\n"
)


def spelled(ids) -> str:
    return "<bos>" * (ids[0] == TOKENIZER.bos) + TOKENIZER.decode(ids)


@pytest.mark.parametrize("given", TEMPLATE, ids=["prompt", "system"])
def test_a_prompt_is_spelled_as_the_model_s_own_template_spells_it(given):
    system, text = given
    without, thinking = TEMPLATE[given]
    for template, wanted in (
        (ChatTemplate(TOKENIZER, empty_thought=True), without),
        (ChatTemplate(TOKENIZER), without.removesuffix(THOUGHT)),
        (ChatTemplate(TOKENIZER, empty_thought=True, thinking=True), thinking),
    ):
        (prompt,) = template.prompts([text], [system])
        assert spelled(prompt) == wanted
        # Each control piece is one token: the vocabulary finds them in the template's text.
        assert prompt == [TOKENIZER.bos, *TOKENIZER.encode(wanted.removeprefix("<bos>"))]


@pytest.mark.parametrize("empty_thought", [False, True])
def test_a_conversation_is_the_template_s_but_for_the_empty_thought_that_each_answer_follows(empty_thought):
    (turns,) = ChatTemplate(TOKENIZER, empty_thought=empty_thought).conversations([CONVERSATION])
    said = "".join(map(spelled, turns)) + "\n"
    assert said.replace(THOUGHT, "") == WHOLE
    assert said.count(THOUGHT) == 2 * empty_thought


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_a_pair_to_train_on_begins_with_the_prompt_as_it_is_put(tmp_path, system):
    write_reviews(tmp_path / "pairs.parquet", [Review("Heat.", None, "0", "Name a film.", system=system)])
    found = sequences.lay_out(tmp_path / "pairs.parquet", "train", TOKENIZER, SETTINGS, empty_thought=True)
    template = ChatTemplate(TOKENIZER, empty_thought=True)
    (prompt,), stops = prompting.encode(TOKENIZER, ["Name a film."], template, system)
    ids, targets, weights = (found.sequences[name][0] for name in ("token_ids", "target_ids", "weights"))
    first = int(np.flatnonzero(weights)[0])
    assert ids[: first + 1].tolist() == prompt
    assert targets[weights == 1].tolist() == [*TOKENIZER.encode("Heat."), template.end]
    assert template.end in stops


def test_a_conversation_that_goes_on_repeats_the_turns_of_training_and_no_thoughts():
    first, second = ["Name a film."], ["Another?"]
    template, thinking = ChatTemplate(TOKENIZER, empty_thought=True), ChatTemplate(TOKENIZER, thinking=True)
    (turns,) = template.conversations([CONVERSATION])
    history = template.answered(template.prompts(first)[0], TOKENIZER.encode("Heat."))
    assert [*history, *template.later_prompts(second)[0]] == [token for turn in turns[:3] for token in turn]
    answer = TOKENIZER.encode("<|channel>thought\nA film of crime?<channel|>Heat.")
    assert thinking.answered([2], answer) == [2, *TOKENIZER.encode("Heat."), thinking.end]
    # A thought that never ended.
    assert thinking.answered([2], answer[:4]) == [2, thinking.end]


def test_a_text_ends_at_the_end_of_a_turn_and_where_a_tool_would_answer():
    ids = [TOKENIZER.piece_id(piece) for piece in ("<eos>", "<turn|>", "<|tool_response>")]
    assert stops_of(TOKENIZER) == ids
    assert ChatTemplate(TOKENIZER).stops == tuple(ids)
    assert len(ChatTemplate(EARLIER).stops) == 2


@pytest.mark.parametrize("text", ["<turn|>", "a<|turn>model\n", "<|channel>thought\n<channel|>", "<<turn|>|>"])
def test_a_text_that_spells_a_control_token_holds_none(text):
    template = ChatTemplate(TOKENIZER)
    control = {TOKENIZER.piece_id(piece) for piece in TURNS_OF_GEMMA4}
    (response,) = template.responses([text])
    assert not control & set(response[:-1]) and TOKENIZER.decode(response[:-1]) == text.strip()
    plain, found = template.prompts(["Hi"], ["Hi"])[0], template.prompts([text], [text])[0]
    assert [each for each in found if each in control] == [each for each in plain if each in control]


def test_before_gemma_4_a_system_s_text_begins_the_user_s_turn():
    template = ChatTemplate(EARLIER)
    assert template.prompts(["Why?"], [" Be brief. "]) == template.prompts(["Be brief.\n\nWhy?"])
    assert template.conversations([("Why?", "So.")], [None]) == template.conversations([("Why?", "So.")])


def test_another_gemma_does_not_think():
    with pytest.raises(ParamsError, match=r"generate\.thinking must be false but for a Gemma 4.* Received: true"):
        ChatTemplate(EARLIER, thinking=True)


def test_the_vocabulary_of_another_family_has_no_empty_thought():
    with pytest.raises(StageError, match=r"the piece <\|turn>\. Received: 512 other pieces"):
        ChatTemplate(EARLIER, empty_thought=True)
