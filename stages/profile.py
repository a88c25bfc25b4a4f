"""List the profiles, or apply one to `params.yaml` in place.

Reads and writes: `params.yaml`; comments and settings that no profile names are kept.
Command: `python -m stages.profile` lists, `python -m stages.profile gpu-single` applies. No stage of the pipeline: it
changes settings, and `dvc repro` then runs what they change.
"""

from __future__ import annotations

from pathlib import Path

from stages.core.cli import click, mistakes_in_lines


@click.command()
@click.argument("name", required=False)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Write this value instead of the profile's; may be repeated.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@click.option("-v", "--verbose", is_flag=True, help="Show the traceback of an error.")
def main(name: str | None, overrides: tuple[str, ...], dry_run: bool, verbose: bool) -> None:
    """List the profiles, or apply the named one to params.yaml.

    A profile sets every key that any profile names, by default as in quickstart, and keeps all others.
    """
    from stages.core.config import profiles
    from stages.core.config.reader import check_params, read_text
    from stages.core.files import write_text

    with mistakes_in_lines(verbose):
        path = Path.cwd() / "params.yaml"
        text = read_text(path)
        if name is None:
            click.echo(profiles.table(text, path.name))
            return
        changed, changes = profiles.apply(name, text, path.name, overrides)
        params = check_params(changed, path.name)
        if changes and not dry_run:
            write_text(path, changed)
    for change in changes:
        click.echo(f"{change.key}: {change.old} \N{RIGHTWARDS ARROW} {change.new}")
    click.echo(profiles.summary(name, params, changes, path.parent, dry_run=dry_run), err=True)


if __name__ == "__main__":
    main()
