"""Tasks of the lm-evaluation-harness: our model answers what the harness asks, by its interface and by the real one."""

from __future__ import annotations

import abc
import functools
import importlib
import importlib.util
import json
import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from stages.core.common.errors import StageError
from stages.core.evaluate import tasks
from stages.core.evaluate.measure import measure
from stages.core.model.causal_lm import make_model
from stages.core.presets.formats import format_of
from tests.support.tiny_models import load_tiny, open_tiny
from tests.support.tuned_models import logits

pytestmark = pytest.mark.usefixtures("devices")
LONGEST = 24
NAME = "stages.core.evaluate.harness"


class AsksForThree(abc.ABC):
    """`lm_eval.api.model.LM` as far as it asks for something."""

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def loglikelihood_rolling(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...


class Manager:
    """`lm_eval.tasks.TaskManager` that knows one task, whose data cannot be had."""

    all_tasks = ("far_away",)

    def load(self, names):
        raise ConnectionError("no network")


@pytest.fixture(scope="module")
def harness():
    """The module, over a stand-in of the package's interface."""
    made = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.tasks")}
    made["lm_eval"].simple_evaluate = None
    made["lm_eval.api.model"].LM = AsksForThree
    made["lm_eval.tasks"].TaskManager = Manager
    with pytest.MonkeyPatch.context() as patch:
        for name, module in made.items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, NAME, raising=False)
        yield importlib.import_module(NAME)
        patch.delitem(sys.modules, NAME)


@pytest.fixture(scope="module")
def loaded(presets):
    """A tiny model on a mesh with its adapter, its tokenizer, and what measures it."""
    folder = presets["gemma3"]
    preset = open_tiny(folder)
    model = load_tiny(folder, (1, 2), rank=2)
    causal = make_model(model.backbone, model.jax_mesh, model.placements)
    causal.compile(optimizer=None, loss=None, jit_compile=True)
    measured = functools.partial(
        measure, causal.token_losses, mesh=model.mesh_shape, max_length=LONGEST, batch_tokens=128
    )
    tokenizer = format_of(preset.manifest.format).load_tokenizer(folder)
    return model, causal, tokenizer, measured


@pytest.fixture(scope="module")
def answering(harness, loaded):
    _, causal, tokenizer, measured = loaded
    return harness.HarnessModel(causal, tokenizer, measured, LONGEST)


def asked(*each):
    return [SimpleNamespace(args=args) for args in each]


def scored(model, ids, first):
    """The log-likelihood of the tokens from a place on, and whether each is the likeliest, by the whole logits."""
    z = logits(model, ids[:-1]).astype(np.float64)[first - 1 :]
    chosen = z[np.arange(len(z)), ids[first:]]
    return float((chosen - np.log(np.exp(z).sum(axis=1))).sum()), bool((z.argmax(axis=1) == ids[first:]).all())


def test_a_continuation_has_the_likelihood_of_its_tokens_after_the_context(answering, loaded):
    model, _, tokenizer, _ = loaded
    pairs = [("This film", " was good"), ("This film ", "was good"), ("", "A review"), ("So <eos>", " it ends")]
    found = answering.loglikelihood(asked(*pairs))
    for (context, continuation), (likelihood, greedy) in zip(pairs[:3], found[:3], strict=True):
        alone = [tokenizer.bos, *tokenizer.encode(context.rstrip())]
        whole = [tokenizer.bos, *tokenizer.encode(context + continuation)]
        expected, likeliest = scored(model, whole, len(alone))
        assert (likelihood, greedy) == (pytest.approx(expected, abs=1e-3), likeliest)
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4), "a space at the end is the continuation's"
    assert math.isfinite(found[3][0])


def test_what_the_model_would_write_itself_is_the_likeliest(answering):
    context = "The best thing about"
    (text,) = answering.generate_until(asked((context, {"max_gen_toks": 3})))
    (_, greedy), (_, other) = answering.loglikelihood(asked((context, text), (context, text[::-1] + "!")))
    assert greedy and not other


def test_of_a_context_that_is_too_long_the_end_is_read(answering, loaded):
    model, _, tokenizer, _ = loaded
    context, continuation = "It is a film about a dog and a cat and " * 4, "a horse"
    ((found, _),) = answering.loglikelihood(asked((context, continuation)))
    whole = tokenizer.encode(context + continuation)
    count = len(whole) - len(tokenizer.encode(context.rstrip()))
    read = [tokenizer.bos, *whole[-LONGEST:]]
    assert found == pytest.approx(scored(model, read, len(read) - count)[0], abs=1e-3)


def test_a_long_text_is_read_in_pieces_that_predict_each_token_once(harness, answering, loaded):
    model, _, tokenizer, _ = loaded
    texts = ["It is a film about a dog and a cat and a horse. " * 2, "Short.", ""]
    found = answering.loglikelihood_rolling(asked(*((text,) for text in texts)))
    for text, likelihood in zip(texts, found, strict=True):
        pieces = harness.windows([tokenizer.bos, *tokenizer.encode(text)], LONGEST)
        assert [each for _, predicted in pieces for each in predicted] == tokenizer.encode(text)
        assert all(len(before) + len(predicted) <= LONGEST + 1 for before, predicted in pieces)
        expected = sum(scored(model, before + predicted, len(before))[0] for before, predicted in pieces)
        assert likelihood == pytest.approx(expected, abs=1e-3)
    assert len(harness.windows(tokenizer.encode(texts[0]), LONGEST)) > 1


def test_texts_end_at_the_first_string_of_until_and_are_in_the_order_of_the_questions(answering):
    contexts = ["The best thing about this film is that", "So", "This movie was"]
    whole = answering.generate_until(asked(*((each, {"max_tokens": 12}) for each in contexts)))
    assert whole == [answering.generate_until(asked((each, {"max_gen_toks": 12})))[0] for each in contexts]
    stop = whole[1][len(whole[1]) // 2]
    cut = answering.generate_until(asked((contexts[1], {"max_gen_toks": 12, "until": [stop, ""]}), (contexts[0], {})))
    assert cut[0] == whole[1].partition(stop)[0]
    assert cut[1].startswith(whole[0])


def test_only_numbers_of_a_result_are_kept(harness):
    values = {"alias": "it", "acc,none": 0.123456, "acc_stderr,none": "N/A", "em,strict": 1, "f1,none": math.nan}
    assert harness.numbers({**values, "sample_len": 4}) == {"acc": 0.12346, "em (strict)": 1.0}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere", "`lm-eval ls tasks` lists. Received: nowhere$"),
        ("far_away", "Received: ConnectionError: no network"),
    ],
)
def test_a_task_that_does_not_exist_or_has_no_data_is_told(harness, name, told):
    with pytest.raises(StageError, match=told) as raised:
        harness.load_tasks([name])
    assert str(raised.value).count("\n") <= 1


def test_without_the_package_its_tasks_are_refused_in_two_lines_and_others_are_not(monkeypatch):
    monkeypatch.setattr(tasks, "PACKAGE", "no_such_package")
    assert tasks.open_harness(["sentiment"]) is None
    with pytest.raises(StageError) as raised:
        tasks.open_harness(["sentiment", "lm_eval:arc_easy"])
    what, remedy = str(raised.value).splitlines()
    assert what.endswith("Received: evaluate.tasks=sentiment, lm_eval:arc_easy")
    assert "pip install -r requirements-tasks.txt" in remedy


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs requirements-tasks.txt")
def test_the_real_harness_gets_scores_of_each_kind_of_task(loaded, tmp_path):
    from stages.core.evaluate.harness import load_tasks

    _, causal, tokenizer, measured = loaded
    rows = [{"text": f"Film {number} was a", "answer": " good", "label": number % 2} for number in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    kinds = {
        "multiple_choice": {
            "doc_to_choice": [" bad", " good"],
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}],
        },
        "loglikelihood_rolling": {"doc_to_target": "{{text}}", "metric_list": [{"metric": "word_perplexity"}]},
        "generate_until": {
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    configured = [{"task": f"own_{kind}", "output_type": kind, **shared, **more} for kind, more in kinds.items()]
    found = load_tasks(configured)(causal, tokenizer, measured, LONGEST, 4)
    assert {task: set(scores) & {"acc", "word_perplexity", "exact_match"} for task, scores in found.items()} == {
        "own_multiple_choice": {"acc"},
        "own_loglikelihood_rolling": {"word_perplexity"},
        "own_generate_until": {"exact_match"},
    }
    assert found["own_multiple_choice"]["acc"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert found["own_loglikelihood_rolling"]["word_perplexity"] > 1
