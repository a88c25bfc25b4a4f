"""Continuing prompts: what the cached loop gives is what one would get token by token without a cache."""

from __future__ import annotations

import numpy as np
import pytest

from stages.core.generate import sampling
from stages.core.model.causal_lm import make_model
from tests.support.repository import FAMILIES
from tests.support.tiny_models import keras_hub_reads, load_tiny

PROMPTS = [[2, 10, 11, 12], [2, 40], [2, 7, 8, 9, 300, 301, 302]]
NO_STOP = 511
LONGEST = 16


def sample(model, prompts, *, temperature=0.0, top_k=None, stop_ids=(NO_STOP,), count=6, seed=0, pieces=None):
    """Run the sampler."""
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    settings = sampling.SamplerSettings(count, temperature, top_k, stop_ids, pieces)
    return sampling.generate(causal, prompts, settings, seed)


def slowly(read, prompt, count):
    """The likeliest continuation by keras-hub's own model, a whole forward pass a token."""
    ids = list(prompt)
    for _ in range(count):
        # What follows a token changes nothing of it, and one length is one program.
        row = np.array([ids + [0] * (LONGEST - len(ids))], np.int32)
        ids.append(int(np.argmax(np.asarray(read(row)[1])[0, len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuations_of_prompts_of_any_length_are_keras_hubs(presets, family):
    read = keras_hub_reads(presets[family])
    expected = [slowly(read, prompt, 6) for prompt in PROMPTS]
    for shape in ((1, 1), (2, 4)):
        assert sample(load_tiny(presets[family], shape), PROMPTS) == expected


def test_a_continuation_ends_at_the_stop_token(presets):
    model = load_tiny(presets["gemma"], (1, 1))
    whole = sample(model, PROMPTS)
    stop = whole[0][2]
    cut = sample(model, PROMPTS, stop_ids=(stop,))
    assert cut[0] == whole[0][: whole[0].index(stop)]


def test_each_of_several_stop_tokens_ends_a_continuation_where_it_comes_first(presets):
    model = load_tiny(presets["gemma"], (1, 1))
    whole = sample(model, PROMPTS)
    stops = (whole[0][3], whole[1][1])
    first = [min([ids.index(stop) for stop in stops if stop in ids], default=len(ids)) for ids in whole]
    assert min(first) < 6
    for order in (stops, stops[::-1], (NO_STOP, *stops)):
        assert sample(model, PROMPTS, stop_ids=order) == [ids[:end] for ids, end in zip(whole, first, strict=True)]


def test_the_same_seed_gives_the_same_text_and_another_seed_another(presets):
    model = load_tiny(presets["gemma3"], (1, 1))
    first = sample(model, PROMPTS, temperature=3.0, seed=1)
    assert first == sample(model, PROMPTS, temperature=3.0, seed=1)
    assert first != sample(model, PROMPTS, temperature=3.0, seed=2)


def test_changing_one_prompt_leaves_the_others_text_alone(presets):
    model = load_tiny(presets["gemma2"], (1, 1))
    first = sample(model, PROMPTS, temperature=2.0)
    changed = sample(model, [PROMPTS[0], [2, 99], PROMPTS[2]], temperature=2.0)
    assert (changed[0], changed[2]) == (first[0], first[2])
    assert changed[1] != first[1]


def test_among_the_likeliest_one_there_is_no_choice(presets):
    model = load_tiny(presets["gemma3"], (1, 1))
    assert sample(model, PROMPTS, temperature=5.0, top_k=1) == sample(model, PROMPTS)
    assert sample(model, PROMPTS, temperature=5.0, top_k=200) != sample(model, PROMPTS)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 50.0])
def test_a_row_of_the_table_without_a_piece_is_never_chosen(presets, shape, temperature):
    model = load_tiny(presets["gemma"], shape)
    free = sample(model, PROMPTS, temperature=temperature, count=12)
    pieces = max(max(ids) for ids in free)
    bound = sample(model, PROMPTS, temperature=temperature, count=12, pieces=pieces)
    assert max(max(ids) for ids in bound) < pieces
    assert bound != free
