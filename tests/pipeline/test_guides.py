"""README and docs: commands that parse, files that exist, and the figures of the committed run."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from dvc.cli.parser import get_main_parser

from stages.core.config.profiles import PROFILES, apply
from stages.core.config.reader import check_params
from tests.support.repository import ROOT

GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> Iterator[list[str]]:
    """The commands of the indented blocks and of `code`, as arguments; a quoted one may span lines."""
    text = re.sub(r"\\\n +", "", text)
    blocks = [line[4:].removeprefix("!") for line in text.splitlines() if line.startswith("    ")]
    pending = ""
    for line in [*blocks, *re.findall(r"`((?:python -m stages|dvc)[^`]*)`", text.replace("\n", " "))]:
        pending = f"{pending}\n{line}" if pending else line
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:
            # A quote that ends on a later line.
            continue
        pending = ""
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


FOUND = [
    (guide.name, words)
    for guide in GUIDES
    for words in commands(guide.read_text())
    if words and (words[0] == "dvc" or words[:2] == ["python", "-m"])
]


@pytest.mark.parametrize(("guide", "words"), FOUND, ids=lambda value: " ".join(value)[:60])
def test_a_command_in_the_guides_parses(guide: str, words: list[str]):
    if words[0] == "dvc":
        if words[1:]:
            get_main_parser().parse_args([word for word in words[1:] if not word.endswith("...")])
    elif words[2].startswith("stages."):
        main = importlib.import_module(words[2]).main
        if "--help" in words:
            return
        options = main.make_context(words[2], words[3:]).params
        text, overrides = (ROOT / "params.yaml").read_text(), options.get("overrides") or ()
        if options.get("name"):
            apply(options["name"], text, "params.yaml", overrides)
        else:
            check_params(text, "params.yaml", overrides)


def test_there_are_commands_of_every_kind():
    kinds = {" ".join(words[:2] if words[0] == "dvc" else words[2:3]) for _, words in FOUND}
    assert {"dvc repro", "dvc exp", "dvc metrics", "stages.finetune", "stages.profile", "stages.cache"} <= kinds


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_what_a_guide_links_or_shows_is_in_the_repository(guide: Path):
    text = guide.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text):
        assert (guide.parent / target).is_file(), target


def test_readme_is_short_and_shows_the_committed_run():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 220
    header, row = (line.split() for line in re.findall(r"(?m)^    (Path .*|data/run\.json .*)$", text))
    run = json.loads((ROOT / "data/run.json").read_text())
    assert dict(zip(header[1:], map(float, row[1:]), strict=True)) == pytest.approx(run, rel=0.01), "DVC rounds"
    compared = json.loads((ROOT / "data/metrics/compare.json").read_text())
    for figure in (
        f"({compared['targets']:,} predicted tokens)",
        f"from {run['perplexity_base']} to {run['perplexity']}, a ratio of {compared['perplexity_ratio']:.3f}",
        f"falls by {-compared['loss_difference']:.3f} nats per token",
        f"standard error of {compared['loss_difference_standard_error']:.3f}",
    ):
        assert figure in " ".join(text.split()), figure


def test_readme_lists_every_profile_and_stage():
    text = (ROOT / "README.md").read_text()
    assert all(f"| `{name}` |" in text for name in PROFILES)
    stages = subprocess.run(["git", "ls-files", "stages/*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {Path(path).stem for path in stages.stdout.split() if path.count("/") == 1} - {"__init__"}
    assert all(re.search(rf"`{name}(@\w+)?`|stages\.{name}\b", text) for name in names)
