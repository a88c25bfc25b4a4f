"""Mutations of a preset's configuration and headers, in a process that may have one gigabyte more than at its start.

Command: `python -m tests.support.fuzz_presets KIND PLACE COUNT SEED`; prints one JSON object. KIND: `config` or `keras
config` (a folder's config.json), `safetensors`, `hdf5` or `gguf` (the part of the file that is no weight).
"""

from __future__ import annotations

import json
import random
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import h5py

from stages.core.common.errors import StageError
from stages.core.fetch.local import fetch_local
from stages.core.presets.formats import format_of
from stages.core.presets.gguf import GgufWeights
from stages.core.presets.gguf_tokenizer import tokenizer_proto
from stages.core.presets.keras_h5 import KerasWeights
from stages.core.presets.safetensors import SafetensorsWeights
from stages.core.presets.weight_table import weight_table

GIGABYTE = 1 << 30
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 2.5, -0.0, 1e-300, 1e308, 10**9, 10**30, 2**63, "", "abc", "8", "\ud800", [], {}),
    *([1], {"a": 1}, [[[]]], float("nan"), float("inf"), "x" * 10_000, {"rope_type": "linear", "factor": 2.0}),
]
# Other values of these are another model, which nothing in the files contradicts.
FREE = {
    *("attention_logit_soft_cap", "final_logit_soft_cap", "sliding_window_size", "local_rope_scaling_factor"),
    *("global_rope_scaling_factor", "image_size", "use_sliding_window_attention", "query_head_dim_normalize"),
}


def mutated_config(content: bytes, rng: random.Random) -> bytes:
    """A configuration with one thing wrong, or unusual."""
    config = json.loads(content)
    part = config["config"] if isinstance(config.get("config"), dict) and rng.random() < 0.8 else config
    key, how = rng.choice(sorted(part)), rng.randrange(10)
    if how < 5:
        part[key] = rng.choice(ODD)
    elif how == 5:
        del part[key]
    elif how == 6:
        part[rng.choice(["x", "moe", "use_bidirectional_attention", "quantization_config", "dropout"])] = rng.choice(
            ODD
        )
    elif how == 7:
        return rng.choice(
            [b"", b"[" * 100_000, b"{" * 9, b"\xff\xfe", b"1" * 5000, content + content, b"\xef\xbb\xbf" + content]
        )
    elif how == 8 and isinstance(part[key], int | float):
        part[key] = part[key] * rng.choice([2, -1, 10**12, 0.5])
    else:
        return flipped(content, range(len(content)), rng)
    return json.dumps(config).encode()


def flipped(content: bytes, places: Any, rng: random.Random) -> bytes:
    """A content with a few bytes of some places changed, or with an end missing."""
    changed = bytearray(content)
    if rng.random() < 0.05:
        return bytes(changed[: rng.choice(places)])
    first = rng.randrange(len(places))
    for place in places[first : first + rng.choice([1, 1, 1, 2, 8])]:
        changed[place] = rng.choice(
            [0, 1, 0x7F, 0x80, 0xFF, changed[place] ^ (1 << rng.randrange(8)), rng.randrange(256)]
        )
    return bytes(changed)


def everything(folder: Path, file_format: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Fetch and read a preset: the architecture's arguments, and every weight."""
    if file_format == "gguf":
        path = next(folder.glob("*.gguf"))
        weights = GgufWeights(path)
        read = {name: weights.read(name).tobytes() for name in weights.paths()}
        tokenizer_proto(path)
        return format_of("gguf").read_architecture(folder).config, read
    manifest = fetch_local("mine", str(folder), folder)
    architecture = format_of(manifest.format).read_architecture(folder)
    cut = {name: (slice(None),) * len(each.shape) for name, each in weight_table(architecture).items()}
    if manifest.format == "keras":
        with KerasWeights(folder, architecture) as source:
            return architecture.config, {name: source.read(name, cut[name]).tobytes() for name in cut}
    tensors = SafetensorsWeights(folder)
    return architecture.config, {name: tensors.read(name, cut[name]).tobytes() for name in cut}


def headers(path: Path) -> list[int]:
    """The places of a weight file that hold no weight's values."""
    size = path.stat().st_size
    if path.suffix == ".safetensors":
        return list(range(8 + int.from_bytes(path.read_bytes()[:8], "little")))
    if path.suffix == ".gguf":
        return list(range(gguf.GGUFReader(path).data_offset))
    values: set[int] = set()
    with h5py.File(path) as file:

        def note(_: str, found: Any) -> None:
            if isinstance(found, h5py.Dataset):
                values.update(range(found.id.get_offset(), found.id.get_offset() + found.id.get_storage_size()))

        file.visititems(note)
    return sorted(set(range(size)) - values)


def run(kind: str, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Try mutations one after the other, and put the file back at the end."""
    rng = random.Random(seed)
    pattern = {"safetensors": "*.safetensors", "hdf5": "*.h5", "gguf": "*.gguf"}.get(kind, "config.json")
    path = next(folder.glob(pattern))
    original = path.read_bytes()
    before = everything(folder, "gguf" if kind == "gguf" else "")
    mutate: Callable[[], bytes]
    if pattern == "config.json":
        mutate = lambda: mutated_config(original, rng)  # noqa: E731
    else:
        places = headers(path)
        mutate = lambda: flipped(original, places, rng)  # noqa: E731
    used = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line).split()[1])
    resource.setrlimit(resource.RLIMIT_AS, (used * 1024 + GIGABYTE, resource.RLIM_INFINITY))
    result: dict[str, Any] = {"tried": 0, "refused": 0, "accepted": 0, "wrong": [], "tracebacks": []}
    for _ in range(count):
        path.write_bytes(content := mutate())
        result["tried"] += 1
        try:
            config, weights = everything(folder, "gguf" if kind == "gguf" else "")
        except StageError:
            result["refused"] += 1
        except BaseException:
            result["tracebacks"].append(f"{traceback.format_exc()[-600:]} {content[:200]!r}")
        else:
            result["accepted"] += 1
            other = sorted(key for key in config if key not in FREE and config[key] != before[0].get(key, 0))
            other += sorted(name for name in before[1] if weights.get(name) != before[1][name])
            if other:
                changed = [
                    (place, old, new)
                    for place, (old, new) in enumerate(zip(original, content, strict=False))
                    if old != new
                ]
                result["wrong"].append(f"{other[:3]} {changed[:9]}")
    path.write_bytes(original)
    return result


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
