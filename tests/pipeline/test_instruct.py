"""Instruct data through the whole pipeline on a tiny preset: only the response and its end are trained on."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from stages.core.presets.tokenizer import Tokenizer
from stages.core.tokenize.chat import ChatTemplate
from tests.support.repository import ROOT
from tests.support.tiny_presets import tiny_proto

pytestmark = pytest.mark.xdist_group("instruct")

RESPONSE = "Avoid it."
# From real settings to a tiny model that learns one response to every prompt by heart.
SETTINGS = [
    "fetch.source=path",
    "fetch.preset=tiny",
    "prepare.source=files",
    "prepare.train_file=pairs.jsonl",
    "prepare.prompt_column=question",
    "prepare.response_column=answer",
    "prepare.validation=6",
    "prepare.min_characters=1",
    "tokenize.length=64",
    "mesh.devices=simulated",
    "finetune.rank=0",
    "finetune.batch_size=4",
    "finetune.epochs=12",
    "finetune.learning_rate=5.0e-3",
    "finetune.schedule=constant",
    "finetune.warmup_steps=0",
    "finetune.sample_every=6",
    "finetune.sample_prompt=What of the comedy about the moon?",
    "finetune.checkpoint_every=null",
    "generate.prompts=['What of the film about two brothers?']",
    "generate.chat_template=true",
    "generate.max_tokens=24",
]
STAGES = ("fetch", "prepare", "tokenize", "quantize", "load", "finetune", "generate", "evaluate")


def settings_on(root: Path) -> list[str]:
    return [*SETTINGS, f"fetch.path={root / 'preset'}"]


@pytest.fixture(scope="module")
def project(presets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's outputs, every stage run as its command runs it."""
    root = tmp_path_factory.mktemp("instruct")
    (root / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    subjects = ["a boat", "the war", "my sister", "a book", "the sea", "two trains"]
    kinds = ["comedy", "drama", "picture", "film", "story"]
    rows = [{"question": f"What of the {kind} about {s}?", "answer": RESPONSE} for kind in kinds for s in subjects]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "preset").symlink_to(presets["gemma3"])
    settings = settings_on(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for stage in STAGES:
            arguments = [part for each in settings for part in ("--set", each)]
            arguments += ["--variant", "tuned"] if stage in ("generate", "evaluate") else []
            importlib.import_module(f"stages.{stage}").main(arguments, standalone_mode=False)
    return root


def metrics(root: Path, name: str) -> dict:
    return json.loads((root / f"data/metrics/{name}.json").read_text())


def test_the_tuned_model_answers_an_unseen_prompt_and_ends_its_turn(project: Path):
    (line,) = (project / "data/generated/tuned.jsonl").read_text().splitlines()
    # The prompt is kept as it was written; the text ends where <end_of_turn> came, well before the last token allowed.
    assert json.loads(line) == {"prompt": "What of the film about two brothers?", "text": RESPONSE}
    assert metrics(project, "generate/tuned")["tokens"] < 24


def test_both_variants_answer_in_a_chat_and_each_goes_on_with_its_own_answers(project: Path, monkeypatch):
    monkeypatch.chdir(project)
    arguments = [part for each in settings_on(project) for part in ("--set", each)]
    question = "What of the film about two brothers?"
    main = importlib.import_module("stages.generate").main
    result = CliRunner().invoke(main, [*arguments, "--chat"], input=f"{question}\n{question}\n\n{question}\n")
    assert result.exit_code == 0, result.output
    answers = [line for line in result.stdout.splitlines() if line.startswith("tuned: ")]
    assert len(answers) == 3
    # The second is the answer to two questions in one conversation, the third begins anew.
    assert answers[0] == answers[2] == f"tuned: {RESPONSE}"
    assert result.stdout.count("baseline: ") == 3
    assert result.stdout.count("A new conversation.") == 1


def test_samples_while_training_are_asked_for_in_turns_too(project: Path):
    samples = [json.loads(line) for line in (project / "data/plots/samples.jsonl").read_text().splitlines()]
    assert samples[-1]["prompt"] == "What of the comedy about the moon?"
    assert samples[-1]["text"] == RESPONSE


def test_loss_and_perplexity_are_over_the_responses_tokens(project: Path):
    counts, measured = metrics(project, "tokenize"), metrics(project, "evaluate/tuned")
    (ids,) = ChatTemplate(Tokenizer.from_proto(tiny_proto())).responses([RESPONSE])
    assert counts["train"]["response_tokens"] == 24 * len(ids)
    assert measured["targets"] == counts["validation"]["response_tokens"] == 6 * len(ids)
    assert measured["reviews"] == 6
    # The prompts, which nothing taught it to predict, would keep the loss high if they counted.
    assert measured["loss"] < 0.1
    assert measured["token_accuracy"] == 1.0
    held_out = np.load(project / "data/tokens/held_out.npz")
    assert held_out["token_ids"][held_out["is_target"]].tolist() == 6 * ids
