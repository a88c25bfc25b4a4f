"""Show what in the cache folder no run will use again, and remove it with `--remove`.

Reads and removes: below the cache folder, checkpoints of runs that were stopped and never continued, half-written
files of runs that were killed, and plans and compiled programs that nothing has used for some days. What a run that
goes on holds stays, and so do downloads.
Command: `python -m stages.cache` shows, `python -m stages.cache --remove` removes. No stage of the pipeline.
"""

from __future__ import annotations

from stages.core.cli import click, mistakes_in_lines


@click.command()
@click.option("--remove", is_flag=True, help="Remove what is shown.")
@click.option(
    "--days",
    type=click.FloatRange(min=0),
    default=14,
    show_default=True,
    help="Keep what was used within so many days, but for half-written checkpoints of killed runs.",
)
@click.option("-v", "--verbose", is_flag=True, help="Show the traceback of an error.")
def main(remove: bool, days: float, verbose: bool) -> None:
    """Show what in the cache folder no run will use again, largest first, and remove it with --remove."""
    with mistakes_in_lines(verbose):
        from stages.core.cache import leftovers
        from stages.core.common.paths import cache_folder
        from stages.core.common.sizes import megabytes

        cache = cache_folder()
        found = leftovers.find(cache, days)
        for each in found:
            place = each.path.relative_to(cache)
            click.echo(f"{megabytes(each.size, 1):>13}  {each.age / leftovers.DAY:6.1f} days  {each.kind}: {place}")
            if remove:
                leftovers.remove(each)
        size = f"{len(found)} leftovers, {megabytes(sum(each.size for each in found), 1)}, in {cache}"
        done = f"Removed {size}." if remove else f"{size}; --remove removes them." if found else f"{size}."
        click.echo(done, err=True)


if __name__ == "__main__":
    main()
