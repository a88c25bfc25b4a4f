"""Records the `config.json` that transformers writes of each family, whole and without its defaults.

Command (where transformers is installed): `python -m tests.data.record_configs` writes
`tests/data/transformers_configs.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

RECORDED = Path(__file__).parent / "transformers_configs.json"


def record() -> None:
    """Write the configurations by name."""
    import transformers

    content = {}
    for name in ("GemmaConfig", "Gemma2Config", "Gemma3TextConfig", "Gemma3Config"):
        architecture = f"{name.removesuffix('Config').removesuffix('Text')}ForCausalLM"
        config = getattr(transformers, name)(architectures=[architecture])
        for short in (True, False):
            key = f"{name}, {'short' if short else 'whole'}"
            content[key] = json.loads(config.to_json_string(use_diff=short))
    RECORDED.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    record()
