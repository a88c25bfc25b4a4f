"""The report's page: rendered, written, and read."""

from __future__ import annotations

import html.parser
import json
import os
import re
import subprocess
from pathlib import Path

from stages.core.common.paths import Paths
from stages.core.config.reader import read_params
from stages.core.report import inputs
from stages.core.report import page as report
from tests.support import warm
from tests.support.report_outputs import write_json
from tests.support.repository import ROOT

MINUS = "\N{MINUS SIGN}"


def rendered(root: Path, *overrides: str) -> str:
    params = read_params(root / "params.yaml", overrides)
    return report.render(inputs.read_inputs(Paths(root, root), params.variants), params)


def saved(root: Path, *overrides: str) -> Path:
    path = root / "index.html"
    path.write_text(rendered(root, *overrides), encoding="utf-8")
    return path


def edit(root: Path, relative: str, **changes) -> None:
    path = root / relative
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def run_stage(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [warm.python(), "-m", "stages.report", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


class Reader(html.parser.HTMLParser):
    """Collects every element with its attributes, and the text outside style and script."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.inline: dict[str, list[str]] = {"style": [], "script": []}
        self.pieces: list[str] = []
        self.inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside in self.inline:
            self.inline[self.inside].append(data)
        else:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.pieces))
