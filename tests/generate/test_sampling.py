"""Continuing prompts: what the two programs give is what one would get token by token without a cache."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from stages.core.generate.choosing import Drawing
from stages.core.generate.sampling import CHUNK, MOST_ROWS, Sampler, SamplerSettings, bucket
from stages.core.model import lora
from stages.core.model.causal_lm import make_model
from tests.support.repository import FAMILIES
from tests.support.tiny_models import keras_hub_reads, load_tiny
from tests.support.tiny_presets import write_tiny_preset

# Of unequal lengths; the last is longer than a window (8) and ends within the new tokens' second chunk.
PROMPTS = [[2, 10, 11, 12], [2, 40], [2, 7, 8, 9, 300, 301, 302], [2, *range(100, 113)]]
COUNT = CHUNK + 4
NO_STOP = 511
LONGEST = 32


def sampler_of(model):
    """A sampler of a loaded model."""
    return Sampler(make_model(model.backbone, model.jax_mesh, model.placements))


def settings(*, count=COUNT, stop_ids=(NO_STOP,), pieces=None, **drawing):
    return SamplerSettings(count, stop_ids, Drawing(**drawing), pieces)


@pytest.fixture(scope="module")
def sampler(presets):
    """Returns the one sampler of a family on a mesh: settings are no part of its programs."""
    return functools.cache(lambda family, shape=(1, 1): sampler_of(load_tiny(presets[family], shape)))


def slowly(read, prompt, count):
    """The likeliest continuation by keras-hub's own model, a whole forward pass a token."""
    ids = list(prompt)
    for _ in range(count):
        # What follows a token changes nothing of it, and one length is one program.
        row = np.array([ids + [0] * (LONGEST - len(ids))], np.int32)
        ids.append(int(np.argmax(np.asarray(read(row)[1])[0, len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def expected(presets):
    """By family what keras-hub continues the prompts with."""
    reads = {family: keras_hub_reads(presets[family]) for family in FAMILIES}
    return {family: [slowly(read, prompt, COUNT) for prompt in PROMPTS] for family, read in reads.items()}


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuations_of_prompts_of_any_length_are_keras_hubs(sampler, expected, family, shape):
    assert sampler(family, shape)(PROMPTS, settings()) == expected[family]


def test_a_window_that_divides_no_width_and_blocks_that_see_everything_are_right_too(presets, tmp_path):
    folder = write_tiny_preset(tmp_path / "six", "gemma3", num_layers=6, sliding_window_size=6)
    read = keras_hub_reads(folder)
    found = sampler_of(load_tiny(folder, (1, 2)))(PROMPTS, settings())
    assert found == [slowly(read, prompt, COUNT) for prompt in PROMPTS]


@pytest.mark.parametrize(("shape", "keep_base"), [((1, 1), False), ((1, 4), True)], ids=str)
def test_merged_adapters_are_keras_own_sum_and_change_no_text(presets, sampler, shape, keep_base):
    model = load_tiny(presets["gemma3"], shape, rank=4, targets=("query", "attention_output", "ffw_gating"))
    apart = sampler_of(model)(PROMPTS, settings())
    layers = [layer for layer in model.backbone._flatten_layers() if getattr(layer, "lora_enabled", False)]
    sums = [np.asarray(layer.kernel) for layer in layers]
    before = [variable.value for variable in model.backbone.variables]
    base, where = [layer._kernel.value for layer in layers], [layer._kernel.value.sharding for layer in layers]
    kept = [np.asarray(each) for each in base]
    lora.set_aside(model.backbone, keep_base=keep_base)()
    for layer, summed, sharding in zip(layers, sums, where, strict=True):
        np.testing.assert_allclose(np.asarray(layer._kernel.value), summed, rtol=1e-6, atol=1e-6)
        assert layer._kernel.value.sharding == sharding
    merged = sampler_of(model)
    assert merged(PROMPTS, settings()) == apart
    if keep_base:
        assert all(np.array_equal(each, old) for each, old in zip(base, kept, strict=True))
        assert merged(PROMPTS, settings(), values=before) == sampler("gemma3", shape)(PROMPTS, settings()) != apart


def test_each_of_several_stop_tokens_ends_a_continuation_where_it_comes_first(sampler):
    whole = sampler("gemma")(PROMPTS, settings())
    stop = whole[0][2]
    assert sampler("gemma")(PROMPTS, settings(stop_ids=(stop,)))[0] == whole[0][: whole[0].index(stop)]
    stops = (whole[0][3], whole[1][1])
    first = [min([ids.index(stop) for stop in stops if stop in ids], default=len(ids)) for ids in whole]
    assert min(first) < COUNT
    for order in (stops, stops[::-1], (NO_STOP, *stops)):
        cut = sampler("gemma")(PROMPTS, settings(stop_ids=order))
        assert cut == [ids[:end] for ids, end in zip(whole, first, strict=True)]


def test_the_same_seed_gives_the_same_text_and_another_seed_another(sampler):
    drawn = sampler("gemma3")(PROMPTS, settings(temperature=3.0), 1)
    assert drawn == sampler("gemma3")(PROMPTS, settings(temperature=3.0), 1)
    assert drawn != sampler("gemma3")(PROMPTS, settings(temperature=3.0), 2)


def test_a_sample_depends_neither_on_its_neighbours_nor_on_their_number(sampler):
    run, wanted = sampler("gemma2"), settings(temperature=2.0, top_p=0.9, repetition_penalty=1.3)
    first = run(PROMPTS, wanted)
    changed = run([PROMPTS[0], [2, 99], *PROMPTS[2:]], wanted)
    assert [changed[0], *changed[2:]] == [first[0], *first[2:]]
    assert changed[1] != first[1]
    # Two batches, of sixteen rows and of four.
    several = run(PROMPTS, wanted, samples=5)
    assert len(several) == 20 > MOST_ROWS
    assert several[::5] == first
    assert len({tuple(ids) for ids in several}) == 20


def test_among_the_likeliest_one_there_is_no_choice(sampler):
    greedy = sampler("gemma3")(PROMPTS, settings())
    assert sampler("gemma3")(PROMPTS, settings(temperature=5.0, top_k=1)) == greedy
    assert sampler("gemma3")(PROMPTS, settings(temperature=5.0, top_p=1e-6)) == greedy
    assert sampler("gemma3")(PROMPTS, settings(temperature=5.0, top_k=200)) != greedy


def test_a_large_repetition_penalty_writes_no_token_twice(sampler):
    def different(found):
        return [len({*prompt, *ids}) - len(prompt) for prompt, ids in zip(PROMPTS, found, strict=True)]

    assert min(different(sampler("gemma3")(PROMPTS, settings()))) < COUNT
    assert different(sampler("gemma3")(PROMPTS, settings(repetition_penalty=1e6))) == [COUNT] * len(PROMPTS)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 50.0])
def test_a_row_of_the_table_without_a_piece_is_never_chosen(sampler, shape, temperature):
    free = sampler("gemma", shape)(PROMPTS, settings(temperature=temperature))
    pieces = max(max(ids) for ids in free)
    bound = sampler("gemma", shape)(PROMPTS, settings(temperature=temperature, pieces=pieces))
    assert max(max(ids) for ids in bound) < pieces
    assert bound != free


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)], ids=str)
def test_other_prompts_and_settings_compile_nothing(sampler, caplog, shape):
    run = sampler("gemma2", shape)
    run(PROMPTS, settings())
    with jax.log_compiles(), caplog.at_level("WARNING"):
        run([[2, 9], [2, *range(50, 61)], [2, 8, 7], [2]], settings(temperature=0.7, top_k=5, min_p=0.1, pieces=500), 3)
        assert not compiled(caplog)
        # One width more is one program more for each pass.
        run([[2, *range(50, 75)]] * 4, settings())
        messages = compiled(caplog)
    assert len(messages) == 2
    assert "_begin" in messages[0] and "_go_on" in messages[1]


def compiled(caplog):
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if "Finished XLA compilation of" in message]


def test_tokens_are_told_as_they_come_and_a_row_ends_where_it_is_told_to(sampler):
    run, wanted = sampler("gemma3"), settings(count=2 * CHUNK)
    whole = run(PROMPTS, wanted)
    told: list[list[list[int]]] = [[] for _ in PROMPTS]
    ends: list[int] = []

    def listen(row, new, ended):
        told[row].append(new)
        ends.extend([row] * ended)
        return row == 1 and len(told[1]) == 2

    found = run(PROMPTS, wanted, listen=listen)
    assert [[token for piece in pieces for token in piece] for pieces in told] == found
    assert [len(piece) for piece in told[0]] == [1, CHUNK, CHUNK - 1]
    assert sorted(ends) == [0, 2, 3]
    assert found[1] == whole[1][: 1 + CHUNK]
    assert [found[row] for row in (0, 2, 3)] == [whole[row] for row in (0, 2, 3)]


def test_a_bucket_is_the_next_power_of_two():
    assert [bucket(count) for count in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]
    assert [bucket(count, 1) for count in (1, 2, 3, 4, 5, 16)] == [1, 2, 4, 4, 8, 16]
