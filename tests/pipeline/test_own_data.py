"""The user's own data, from a clone to a tuned model with the three settings that README shows."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.support.copies import change, copy_repository, dvc, ran
from tests.support.repository import ROOT
from tests.support.tiny_presets import tiny_reviews

pytestmark = pytest.mark.xdist_group("pipeline")

COMMANDS = re.findall(r"(?m)^    (dvc exp run .*prepare\.source=files.*)$", (ROOT / "README.md").read_text())


@pytest.fixture(scope="module")
def repository(one_block: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository on a tiny preset, with a CSV of reviews and a JSONL of conversations."""
    folder = copy_repository(tmp_path_factory.mktemp("repository"))
    change(folder, "fetch", source="path", preset="tiny", path=str(one_block))
    change(folder, "prepare", validation=4)
    change(folder, "tokenize", length=64)
    reviews = tiny_reviews(24)
    with (folder / "reviews.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["id", "review"], *enumerate(reviews)])
    chats = [
        [
            {"role": "system", "content": "Answer in one sentence."},
            {"role": "user", "content": f"What of film {number}?"},
            {"role": "assistant", "content": review},
            {"role": "user", "content": "And the music?"},
            {"role": "assistant", "content": "It is good."},
        ]
        for number, review in enumerate(reviews)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split("=")[-1])
def test_three_settings_tune_on_the_users_own_data(repository: Path, command: str):
    arguments = shlex.split(command, comments=True)[1:]
    assert arguments.count("-S") == 3
    result = dvc(repository, *arguments, "finetune")
    assert {"prepare", "tokenize", "finetune"} <= ran(result)
    prepared = json.loads((repository / "data/metrics/prepare.json").read_text())
    assert (prepared["reviews_read"], prepared["validation_reviews"]) == (24, 4)
    assert (repository / "models/tuned/adapter.safetensors").is_file()


def test_readme_shows_reviews_and_conversations():
    assert ["text_column" in command for command in COMMANDS] == [True, False]
