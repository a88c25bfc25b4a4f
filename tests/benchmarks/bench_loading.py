"""Loading side by side: Gemma 3 270M onto eight simulated devices, our way and by keras-hub's `from_preset`.

Every side is a fresh process; they take turns, since the machine's own speed drifts, so only ratios are worth quoting.
Times are from after the imports until every weight is in place; memory is the process's peak above what the imports
left, as a multiple of the weights' bytes in float32. Needs the fetched preset (`dvc repro fetch`); from it a keras-hub
preset is written once to a temporary folder (1.1 GB).
Command: `python -m tests.benchmarks.bench_loading --rounds 5`
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

MESH = (1, 8)
SIDES = {
    "ours, .h5": "our loader from the keras-hub preset",
    "from_preset": "Gemma3CausalLM.from_preset under the same ModelParallel",
    "ours, GGUF": "our loader from the embedded GGUF, dequantized on the way",
}
# What the project must reach (issue 3): time against from_preset, peak memory against the weights' bytes.
TIME_TARGET, MEMORY_TARGET = 0.35, 1.5


def resident(field: str) -> int:
    """Return VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def forget_peak() -> int:
    """Start the peak anew from what is resident now (proc(5), clear_refs), and return that."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def open_preset(folder: Path):
    """Return a preset folder as the stages have it, without hashing its files."""
    from stages.core.load.variants import Preset
    from stages.core.presets.formats import format_of
    from stages.core.presets.manifest import LICENSE
    from stages.core.records.manifest import Manifest

    file_format = "gguf" if list(folder.glob("*.gguf")) else "keras"
    manifest = Manifest(
        preset="gemma3_270m",
        source="path",
        format=file_format,
        handle=None,
        folder=str(folder),
        license=LICENSE,
        files=(),
    )
    return Preset(manifest, folder, format_of(file_format).read_architecture(folder))


def describe(preset, shape: tuple[int, int]):
    """Return the `model.json` of a baseline laid out by `auto`."""
    from stages.core.load import variants
    from stages.core.sharding.mesh import MeshShape
    from stages.core.sharding.named_layouts import auto

    mesh = MeshShape(shape, device_kind="simulated")
    return variants.model_config(preset, "float32", mesh, auto(preset.architecture, mesh))


def load_ours(folder: Path, shape: tuple[int, int] = MESH):
    """Load as the load stage does."""
    from stages.core.load import variants

    preset = open_preset(folder)
    model = variants.declare_model(describe(preset, shape), preset.architecture, None)
    variants.fill_model(model, preset, {})
    return model.backbone


def load_theirs(folder: Path):
    """Load by keras-hub, over the same mesh and rules."""
    import keras
    import keras_hub

    from stages.core.sharding import mesh as meshes

    rules = describe(open_preset(folder), MESH).layout.rules
    device_mesh = meshes.device_mesh(meshes.MeshShape(MESH))
    keras.distribution.set_distribution(meshes.distribution(device_mesh, {rule.anchored: rule.spec for rule in rules}))
    return keras_hub.models.Gemma3CausalLM.from_preset(str(folder), dtype="float32").backbone


def run_side(side: str, folder: Path) -> dict[str, float]:
    """Measure one side in this process."""
    from stages.core.sharding import devices

    devices.configure("simulated", MESH[0] * MESH[1])
    if side == "from_preset":
        # With TensorFlow, which its tokenizer needs.
        import keras_hub  # noqa: F401
    else:
        from stages.core.load import backbone

        backbone.import_keras_hub()
    import gguf  # noqa: F401
    import h5py  # noqa: F401
    import jax
    import numpy as np

    from stages.core.load import variants  # noqa: F401
    from stages.core.presets import manifest

    jax.block_until_ready(jax.device_put(1.0))
    baseline = forget_peak()
    began = time.perf_counter()
    backbone = load_theirs(folder) if side == "from_preset" else load_ours(folder)
    jax.block_until_ready([variable.value for variable in backbone.weights])
    seconds = time.perf_counter() - began
    size = sum(variable.value.nbytes for variable in backbone.weights)
    peak, left = (resident("VmHWM") - baseline) / size, (resident("VmRSS") - baseline) / size
    # On the host: so many sums over devices, one after another and not waited for, can wedge the simulated devices.
    checksum = sum(float(np.abs(np.asarray(variable.value)).sum(dtype=np.float64)) for variable in backbone.weights)
    began = time.perf_counter()
    if side != "from_preset":
        # The load stage also makes sure that the files are those of the manifest; from_preset has nothing like it.
        for file in [*folder.glob("*.h5"), *folder.glob("*.gguf")]:
            manifest.sha256_with_progress(file)
    check = time.perf_counter() - began
    return {"seconds": seconds, "check": check, "peak": peak, "left": left, "checksum": checksum}


def write_preset(source: Path, target: Path) -> None:
    """Write the embedded model as a keras-hub preset, tokenizer and preprocessor with it."""
    from stages.core.presets.gguf_tokenizer import tokenizer_proto
    from stages.core.sharding import devices

    devices.configure("simulated", 1)
    import keras_hub

    load_ours(source, (1, 1)).save_to_preset(str(target))
    proto = tokenizer_proto(next(source.glob("*.gguf")))
    tokenizer = keras_hub.models.Gemma3Tokenizer(proto, has_vision_tokens=False)
    keras_hub.models.Gemma3CausalLMPreprocessor(tokenizer).save_to_preset(str(target))


def child(*arguments: str) -> str:
    """Run this script in a process of its own and return the last line it prints."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_loading", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return (done.stdout.splitlines() or [""])[-1]


@click.command()
@click.option("--rounds", default=3, show_default=True, help="How often each side takes its turn.")
@click.option("--preset", type=click.Path(path_type=Path), help="A keras-hub preset written before, to write none.")
@click.option("--side", type=click.Choice([*SIDES, "write"]), hidden=True)
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
@click.option("--target", type=click.Path(path_type=Path), hidden=True)
def main(rounds: int, preset: Path | None, side: str | None, folder: Path | None, target: Path | None) -> None:
    """Compare loading times and peaks, and print medians and ratios."""
    if side == "write":
        write_preset(folder, target)
        return
    if side:
        click.echo(json.dumps(run_side(side, folder)))
        return
    from stages.core.common.paths import cache_folder

    embedded = next((cache_folder() / "presets").glob("*/*.gguf"), None)
    if embedded is None:
        raise click.ClickException("the embedded preset is not in the cache; run `python -m stages.fetch`")
    with tempfile.TemporaryDirectory(prefix="bench-loading-") as temporary:
        if preset is None:
            preset = Path(temporary) / "preset"
            child("--side", "write", "--folder", str(embedded.parent), "--target", str(preset))
        results: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
        for number in range(rounds):
            for name in SIDES:
                source = embedded.parent if name == "ours, GGUF" else preset
                results[name].append(json.loads(child("--side", name, "--folder", str(source))))
                click.echo(f"round {number + 1}, {name}: {results[name][-1]}", err=True)
    report(results)


def report(results: dict[str, list[dict[str, float]]]) -> None:
    """Print the table, and whether the targets are met."""
    checksums = {round(each["checksum"], 3) for runs in results.values() for each in runs}
    if len(checksums) != 1:
        raise click.ClickException(f"the sides must load the same weights. Received: checksums={checksums}")
    median = {
        name: {key: statistics.median(each[key] for each in runs) for key in ("seconds", "check", "peak", "left")}
        for name, runs in results.items()
    }
    ratio = {
        name: statistics.median(
            ours["seconds"] / theirs["seconds"] for ours, theirs in zip(runs, results["from_preset"], strict=True)
        )
        for name, runs in results.items()
    }
    click.echo(
        f"{'':<12} {'seconds':>8} {'of from_preset':>15} {'SHA-256 s':>10} {'peak / weights':>15} "
        f"{'left / weights':>15}"
    )
    for name, each in median.items():
        click.echo(
            f"{name:<12} {each['seconds']:>8.2f} {ratio[name]:>15.2f} {each['check']:>10.2f} {each['peak']:>15.2f} "
            f"{each['left']:>15.2f}   {SIDES[name]}"
        )
    click.echo(
        f"Targets: {ratio['ours, .h5']:.2f} of from_preset's time (at most {TIME_TARGET}), "
        f"peak {median['ours, .h5']['peak']:.2f} x the weights (at most {MEMORY_TARGET})."
    )


if __name__ == "__main__":
    main()
