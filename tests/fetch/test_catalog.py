"""The table of text Gemmas, held to the registry of the keras-hub that is installed."""

from __future__ import annotations

import re

import pytest

from stages.core.common.errors import ParamsError
from stages.core.fetch import catalog
from stages.core.fetch.catalog import (
    EMBEDDING,
    OTHERS,
    REGISTRY,
    VISION,
    is_base,
    kaggle_handle,
    license_of,
    registered,
)
from stages.core.presets.manifest import LICENSE
from stages.core.records.manifest import License


@pytest.fixture(scope="module")
def keras_hub_presets(devices):
    import keras_hub

    models = keras_hub.models
    return models.GemmaBackbone.presets | models.Gemma3Backbone.presets | models.Gemma4Backbone.presets


def test_the_table_has_each_preset_of_keras_hubs_registry(keras_hub_presets):
    refused = {name for name in keras_hub_presets if name.startswith("gemma4") and name not in REGISTRY}
    assert {*REGISTRY, *VISION, *EMBEDDING, *refused} == set(keras_hub_presets)
    for name in refused:
        with pytest.raises(ParamsError, match=r"only drafts tokens|Of Gemma 4 it runs"):
            registered(name, "fetch.preset")
    for name, ours in REGISTRY.items():
        theirs = keras_hub_presets[name]
        assert (ours.handle, ours.parameters) == (theirs["kaggle_handle"], theirs["metadata"]["params"]), name


def test_what_is_refused_is_what_keras_hub_says_it_is(keras_hub_presets):
    for name in VISION:
        counted = keras_hub_presets[name]["metadata"]["params"]
        # The tower is about 420 million parameters beside those of the text model.
        texts = [each.parameters for each in REGISTRY.values()]
        assert any(4.1e8 < counted - text < 4.3e8 for text in texts), name
    assert {text for text in VISION.values() if not text.startswith("hf://google/")} <= set(REGISTRY)
    for name in EMBEDDING:
        assert "mbedding" in keras_hub_presets[name]["metadata"]["description"]


def test_families_with_other_backbones_are_known_by_how_their_names_begin(keras_hub_presets):
    import keras_hub

    for prefix, backbone in zip(OTHERS, ("Gemma3nBackbone", "PaliGemmaBackbone", "T5GemmaBackbone"), strict=True):
        names = getattr(keras_hub.models, backbone).presets
        assert names
        assert all(name.startswith(prefix) for name in names), backbone
    assert not any(name.startswith(tuple(OTHERS)) for name in REGISTRY)


def test_a_preset_has_as_many_parameters_as_the_one_whose_architecture_it_shares():
    for name, each in REGISTRY.items():
        if not name.startswith("gemma4"):  # of which the registry counts the towers, and rounds
            assert each.parameters == catalog.GEMMAS[each.like]["params"], name
        # The same family: Gemma 1, 2 and 3 do not share architectures.
        assert catalog.architecture(name) == catalog.architecture(each.like)
    assert {each.like for each in REGISTRY.values()} == set(catalog.GEMMAS)


@pytest.mark.parametrize("preset", ["gemma_instruct_7b_en", "kaggle://keras/gemma/keras/gemma_7b_en/2"])
def test_tuned_forms_and_handles_have_the_architecture_of_their_base(preset):
    assert catalog.architecture(preset) == catalog.architecture("gemma_7b_en")


REFUSED = {
    "gemma3_4b": r"gemma3_4b has a vision tower\. .*\nIts text preset is gemma3_4b_text\.",
    "gemma3_instruct_27b": r"has a vision tower\. .*\nIts text preset is gemma3_instruct_27b_text\.",
    "medgemma_4b": r"has a vision tower\. .*\nOf its plain checkpoint the text model is read: .*hf://google/medgemma-4b-pt",
    "translategemma_4b_it": r"the text model is read: fetch\.source=huggingface, hf://google/translategemma-4b-it\.",
    "embedding_gemma3_300m": r"embedding model without a language head\. ",
    "gemma3n_e2b": r"Gemma 3n has another architecture",
    "gemma4_instruct_31b_assistant": r"only drafts tokens for another .*\nThe model itself is gemma4_instruct_31b\.",
    "gemma_7b": r"Received: fetch\.preset=gemma_7b\nDid you mean gemma_7b_en\?",
    "gemma-3-270m": r"Did you mean gemma3_270m or ",
    "qwq": r"There are gemma_2b_en, ",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_gemma_is_refused_with_the_reason_and_a_way_on(name):
    with pytest.raises(ParamsError) as caught:
        registered(name, "fetch.preset")
    assert re.search(REFUSED[name], str(caught.value))
    assert len(str(caught.value).splitlines()) == 2
    assert f"Received: fetch.preset={name}\n" in str(caught.value)


def test_a_whole_handle_of_a_vision_model_is_refused_too():
    with pytest.raises(ParamsError, match="vision tower"):
        kaggle_handle("kaggle://keras/gemma3/keras/gemma3_4b/1")
    assert kaggle_handle("kaggle://keras/gemma3/keras/gemma3_1b/2")[1] == 999885952
    assert kaggle_handle("kaggle://somebody/tuned/keras/gemma3_4b/1")[1] == 0


def test_each_preset_comes_with_its_own_terms():
    assert license_of("gemma3_270m") == license_of("shieldgemma_2b_en") == LICENSE
    assert license_of("kaggle://keras/gemma/keras/gemma_7b_en/2") == LICENSE
    health = license_of("medgemma_instruct_27b_text")
    assert health.name == "Health AI Developer Foundations Terms of Use"
    page = "https://www.kaggle.com/models/"
    unread = "terms on the model's page"
    assert license_of("c2s_scale_gemma_2_2b_en") == License(unread, f"{page}keras/cell2sentence")
    assert license_of("kaggle://somebody/tuned/keras/mine/1") == License(unread, f"{page}somebody/tuned")


@pytest.mark.parametrize(
    ("preset", "base"),
    [
        ("gemma3_270m", True),
        ("kaggle://keras/gemma2/keras/gemma2_2b_en/2", True),
        ("hf://keras/gemma3_1b", True),
        ("hf://google/gemma-3-1b-pt@main", True),
        ("hf://google/gemma-3-270m", True),
        ("hf://google/gemma-4-E2B", True),
        ("hf://google/gemma-4-E4B-it", False),
        ("vault_gemma_1b_en", True),
        ("hf://unsloth/gemma-2-9b", True),
        ("gemma3_instruct_270m", False),
        ("hf://keras/gemma3_instruct_1b", False),
        ("hf://google/gemma-3-1b-it", False),
        ("hf://google/gemma-3-270m-it", False),
        ("hf://somebody/my-gemma-2b", False),
        ("kaggle://somebody/mine/keras/gemma3_270m/1", False),
        ("my own", False),
    ],
)
def test_base_models_are_known_by_name_and_of_others_nothing_is_claimed(preset, base):
    assert is_base(preset) is base


def test_of_each_instruct_preset_of_the_registry_it_is_known_that_it_is_no_base_model():
    assert not any(is_base(name) for name in REGISTRY if "instruct" in name)
    assert all(is_base(name) for name in catalog.GEMMAS)
