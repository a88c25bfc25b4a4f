"""The report: one HTML page that shows an engineer what the pipeline did and how the model was sharded.

Purpose: read every output, turn numbers into text with units, and render `template.html`. The page is one file:
its style and script are inline, allowed by their hashes, and nothing else may run or load. Text from a model or a
review only ever passes through autoescaping. The same inputs give the same bytes: no time stamps.
Reads: the preset's manifest and `data/sharding/base.json`; where they exist `data/sharding/tuned.json` and `plan.json`,
`data/metrics/`, `data/plots/` and `data/generated/`. Writes nothing itself.
Command: python -m stages.report
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stages.core.common.paths import CURVE, PLAN, SAMPLES, SHARDING, generated, metrics
from stages.core.config.schema import Params
from stages.core.report.figures import (
    curve_charts,
    dimensions,
    facts,
    fallbacks,
    headlines,
    memory,
    pairs,
    partition_spec,
    run_as_planned,
    verdict,
)
from stages.core.report.inputs import VARIANTS, Inputs
from stages.core.report.mesh_picture import mesh_picture
from stages.core.report.plan_section import Training, plan_view
from stages.core.report.text import binary, percent, quantity
from stages.core.report.variants_table import variants_table

PACKAGES = ("keras", "keras-hub", "jax", "jaxlib")
# C0 controls other than tab and newline have no meaning in HTML; Unicode has a visible picture for each (U+2400 on).
PICTURES = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)} | {0x7F: 0x2421}


def settings(params: Params) -> dict[str, list[tuple[str, str]]]:
    """Return the settings by section as (key, text), values written as YAML would take them."""

    def text(value: Any) -> str:
        if isinstance(value, list) and value and all(isinstance(entry, str) and " " in entry for entry in value):
            return "\n".join(json.dumps(entry, ensure_ascii=False) for entry in value)
        if isinstance(value, list) and not any(isinstance(entry, dict | list) for entry in value):
            return f"[{', '.join(text(entry) for entry in value)}]"
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    return {
        section: [(key, text(value)) for key, value in values.items()]
        for section, values in params.model_dump().items()
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that do the work, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def training(inputs: Inputs, params: Params) -> Training:
    """Return how much the run trains on, as far as it is known."""
    settings = params.finetune
    sequences = inputs.tokenize.train.sequences if inputs.tokenize else None
    positions = None if sequences is None else sequences * params.tokenize.length * settings.epochs
    return Training(positions, settings.gradient_accumulation, settings.steps)


def numbers(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return the values of a metrics file as (key, text), nested keys joined by points."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += numbers(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", quantity(key, value)))
    return found


def clean(value: Any) -> Any:
    """Return a text that HTML can hold unchanged: what a browser would drop or refuse gets a visible stand-in.

    Control characters become their Unicode pictures and lone surrogates (half of a pair, as broken JSON can hold)
    U+FFFD. Anything but plain text is given back as it is.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    whole = value.replace("\r\n", "\n").translate(PICTURES)
    return "".join("\N{REPLACEMENT CHARACTER}" if "\ud800" <= char <= "\udfff" else char for char in whole)


def web_address(text: str) -> str | None:
    """Return the text if it is a web address to link to, else None: `javascript:` is an address too."""
    return text if text.startswith(("https://", "http://")) else None


def source_hash(text: str) -> str:
    """Return the Content-Security-Policy source that allows exactly this inline text (W3C CSP level 3, 2.3.1)."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def fill(template: str, **values: Any) -> str:
    """Return a page of this folder as text: one file, in which nothing but its own style and script may run or load.

    Args:
        template: its file, which extends `base.html`.
        values: what it shows. Every text among them is escaped.
    """
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=clean,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "binary": binary,
        "percent": percent,
        "spec": partition_spec,
        "dimensions": dimensions,
        "web_address": web_address,
    }
    own = {"style": (folder / "style.css").read_text("utf-8"), "script": (folder / "script.js").read_text("utf-8")}
    return environment.get_template(template).render(
        hashes={name: source_hash(text) for name, text in own.items()},
        **{name: Markup(text) for name, text in own.items()},
        **values,
    )


def render(inputs: Inputs, params: Params) -> str:
    """Return the report as text."""
    sharding = inputs.sharding.get("tuned") or inputs.sharding["baseline"]
    charts, curve_notes = curve_charts(inputs.curve) if inputs.curve is not None else ([], [])
    return fill(
        "template.html",
        inputs=inputs,
        manifest=inputs.manifest,
        missing=inputs.missing,
        sharding=sharding,
        weights_of="tuned" if "tuned" in inputs.sharding else "baseline",
        devices=math.prod(sharding.mesh.shape),
        params=params,
        verdict=verdict(inputs, params),
        headlines=headlines(inputs.evaluate, inputs.compare),
        targets=[(variant, values.targets) for variant, values in inputs.evaluate.items() if variant in VARIANTS],
        variants_table=variants_table(inputs),
        reviews_cut=max((values.reviews_cut for values in inputs.evaluate.values()), default=0),
        facts=facts(inputs),
        charts=charts,
        curve_notes=curve_notes,
        pairs=pairs(inputs.generations),
        mesh=mesh_picture(sharding.mesh.shape, sharding.mesh.axis_names),
        largest=max((w for w in sharding.weights if not w.replicated), key=lambda w: w.bytes // w.count, default=None),
        memory=memory(inputs.sharding),
        fallbacks=fallbacks(inputs.sharding),
        plan=inputs.plan
        and plan_view(
            inputs.plan,
            run_as_planned(sharding, params),
            sharding.mesh.device_kind,
            inputs.finetune,
            training(inputs, params),
        ),
        numbers={name: numbers(record.content()) for name, record in inputs.metrics.items() if record},
        metrics_files=[metrics(name) for name in inputs.metrics],
        settings=settings(params),
        versions=versions(),
        paths={"curve": CURVE, "samples": SAMPLES, "plan": PLAN, "tuned_sharding": SHARDING["tuned"]}
        | {"finetune": metrics("finetune"), "compare": metrics("compare")},
        generated_files=[generated(variant) for variant in inputs.variants],
        evaluate_files=[metrics(f"evaluate/{variant}") for variant in inputs.variants],
    )
