"""A stand-in for every stage: writes outputs that change when a dependency or a setting does, and takes no time.

Whether DVC reruns a stage depends on dvc.yaml alone, so the tests of that need no model. Run as
`python -m tests.support.stand_in STAGE [VARIANT]` in a copy of the repository.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

from ruamel.yaml import YAML

from stages.core.common.paths import SUMMARY
from stages.core.records.summary import Summary
from tests.support import warm
from tests.support.repository import STAGES, of_variant, outputs

# The figures that differ between runs of one model on one machine.
FIGURES = sorted(Summary.model_fields.keys() - {"variants"})
TUNED = {"perplexity", "loss", "accuracy", "step_s", "tokens_per_s", "peak_gib"}


def install(repository: Path) -> None:
    """Put the stand-in in the place of each stage's command."""
    path = repository / "dvc.yaml"
    command = rf"{warm.python('records')} -m {__name__} \1"
    path.write_text(re.sub(r"python -m stages\.(\w+)(?: --variant)?", command, path.read_text()))


def main(stage: str, variant: str = "") -> None:
    """Write each output of a stage as a digest of what the stage depends on."""
    params = YAML(typ="safe").load(Path("params.yaml").read_text())
    digest = hashlib.sha256()
    for name in STAGES[stage].get("params", []):
        section, _, key = name.partition(".")
        digest.update(json.dumps(params[section][key] if key else params[section]).encode())
    for dependency in STAGES[stage]["deps"]:
        path = Path(of_variant(dependency, variant, params["variants"].get(variant, "")))
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            digest.update(file.read_bytes() if file.is_file() else b"")
    for name in outputs(stage, variants=[variant]):
        # A folder's file has the name by which stages depend on one.
        path = Path(name) if Path(name).suffix else Path(name) / "model.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({name: digest.hexdigest()}))
    if stage == "report":
        Path(SUMMARY).write_text(
            json.dumps({name: 1.0 + (name in TUNED) * digest.digest()[0] / 1000 for name in FIGURES})
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
