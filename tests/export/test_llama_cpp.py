"""What export writes as GGUF, in llama.cpp itself: logits, adapters and token ids.

llama.cpp rounds where this project does not (its table of GELU is of half-precision numbers): its float32 logits differ
by some 5e-4 of their range, whatever wrote the file. The tolerance is 1e-3 of the range. Rounding moves the logits of
random weights in the shape of E2B six to sixteen times as far as those of the others (noise of 1e-5 on all weights:
6.8e-4 of the range, the others 4e-5 to 1.1e-4), so theirs is 5e-3, and of 41 choices one may be another.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from stages.core.export import proof
from stages.core.export.adapter import common_rank, lora_modules, peft_tensors
from stages.core.export.gguf_adapter import write_gguf_adapter
from stages.core.export.llama_cpp import opened
from stages.core.export.tuned import TrainedWeights
from stages.core.export.vocabulary import SPACE
from stages.core.presets.formats import format_of
from stages.core.tokenize.chat import stops_of
from stages.core.tokenize.control_tokens import ControlTokens
from tests.support import tiny_presets
from tests.support.exported_gguf import SPELLED, SPELLED_OF_GEMMA4, TEXTS, written
from tests.support.tiny_models import load_tiny
from tests.support.tuned_models import MODELS, logits, tuned

TOLERANCE = 1e-3
TOLERANCES = {name: 5e-3 if name == "E2B" else TOLERANCE for name in MODELS}
# Five windows of 8 tokens.
IDS = [2, *np.random.default_rng(0).integers(4, 512, 40).tolist()]


pytest.importorskip("xllamacpp", reason="needs llama.cpp (requirements-readers.txt)")


@pytest.fixture(scope="module")
def exported(devices, tmp_path_factory):
    """Of each family: the tuned model, its logits and the base's by the pipeline, and a folder."""
    made = {}
    for name, (family, arguments) in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        preset = tiny_presets.write_tiny_preset(folder / "preset", family, **arguments)
        loaded, model = tuned(preset, folder)
        base = logits(load_tiny(preset, (1, 1)), IDS)
        made[name] = model, logits(loaded, IDS), base, folder
    return made


def far_apart(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference as a part of the range of the first."""
    return float(np.abs(one - other).max() / np.ptp(one))


@pytest.mark.parametrize("name", MODELS)
def test_the_merged_model_has_the_tuned_model_s_logits_past_the_sliding_window(exported, name):
    model, expected, base, folder = exported[name]
    with opened(written(model, folder / "f32")) as llama:
        found = llama.logits(IDS)
    assert far_apart(expected, base) > 100 * TOLERANCE
    assert far_apart(expected, found) <= TOLERANCES[name]
    assert (found.argmax(-1) != expected.argmax(-1)).sum() <= (name == "E2B")


@pytest.mark.parametrize("name", MODELS)
def test_the_adapter_on_the_base_s_file_equals_the_merged_model(exported, name):
    model, expected, base, folder = exported[name]
    untuned = dataclasses.replace(model, trained=TrainedWeights(None))
    modules = lora_modules(model)
    write_gguf_adapter(
        folder / "lora.gguf", model.preset.architecture, peft_tensors(model, modules), common_rank(modules), name="tiny"
    )
    with opened(written(untuned, folder / "base")) as llama:
        assert far_apart(base, llama.logits(IDS)) <= TOLERANCES[name]
        found = llama.logits(IDS, folder / "lora.gguf")
    assert far_apart(expected, found) <= TOLERANCES[name]
    assert (found.argmax(-1) != expected.argmax(-1)).sum() <= (name == "E2B")


def test_gemma_2_with_an_adapter_on_query_and_value_in_several_blocks(devices, tmp_path):
    preset = tiny_presets.write_tiny_preset(tmp_path / "preset", "gemma2", num_layers=4, seed=3)
    loaded, model = tuned(preset, tmp_path, ("query", "value"))
    expected = logits(loaded, IDS)
    with opened(written(model, tmp_path / "out")) as llama:
        found = llama.logits(IDS)
    assert far_apart(expected, found) <= TOLERANCE
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize(("kind", "tolerance"), [("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 5e-2)])
def test_smaller_types_differ_by_their_rounding(exported, kind, tolerance):
    model, expected, _, folder = exported["gemma3"]
    with opened(written(model, folder / kind, kind)) as llama:
        assert TOLERANCE / 10 < far_apart(expected, llama.logits(IDS)) <= tolerance


def test_token_ids_of_gemma_4_are_ours_and_llama_cpp_stops_where_its_turns_end(exported):
    model, _, _, folder = exported["gemma4"]
    ours = format_of("keras").load_tokenizer(model.preset.folder)
    with opened(written(model, folder / "tokens", chat_template="{{ bos_token }}"), vocabulary_only=True) as llama:
        assert [llama.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
        assert llama.encode("Hi", add_special=True) == [ours.bos, *ours.encode("Hi")]
        spelled = SPELLED_OF_GEMMA4
        assert llama.encode(spelled, parse_special=True) == ControlTokens(ours).as_tokens([spelled])[0]
        ends = ours.piece_id("<turn|>")
        assert llama.special() == {"bos": 2, "eos": 1, "eot": ends, "pad": 0}
        assert all(llama.ends_generation(number) for number in stops_of(ours))
        assert not [number for number in llama.encode(spelled) if llama.is_control(number)]
        # What an answer is taken apart by is shown.
        assert not llama.is_control(ours.piece_id("<|channel>"))


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_token_ids_are_ours_and_no_text_spells_a_control_token(exported, family):
    model, _, _, folder = exported[family]
    ours = format_of("keras").load_tokenizer(model.preset.folder)
    path = written(model, folder / "tokens", chat_template="{{ bos_token }}")
    with opened(path, vocabulary_only=True) as llama:
        assert [llama.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
        assert llama.encode("Hi", add_special=True) == [ours.bos, *ours.encode("Hi")]
        assert llama.encode(SPELLED, parse_special=True) == ControlTokens(ours).as_tokens([SPELLED])[0]
        ends = ours.piece_id("<end_of_turn>")
        assert llama.special() == {"bos": 2, "eos": 1, "eot": ends, "pad": 0}
        assert llama.ends_generation(ends)
        assert llama.chat_template() == "{{ bos_token }}"
        assert not [number for number in llama.encode(SPELLED) if llama.is_control(number)]


def test_the_embedded_model_s_tokens_are_ours_but_for_what_its_own_file_has_for_spaces(real_gguf):
    ours = format_of("gguf").load_tokenizer(real_gguf.parent)
    text = proof.TEXT.replace(SPACE, "")
    with opened(real_gguf, vocabulary_only=True) as llama:
        assert llama.encode(text, parse_special=True) == ControlTokens(ours).as_tokens([text])[0]
        assert llama.encode(f"{SPACE}{SPACE}x") != ours.encode(f"{SPACE}{SPACE}x")
