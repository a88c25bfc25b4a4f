"""Continue the prompts with a variant of the model: before tuning (baseline), after (tuned), or with another adapter.

Reads: `models/<variant>/` or the folder that `variants` names, the preset; params `generate` and `variants`.
Writes: `data/generated/<variant>.jsonl`, `data/metrics/generate/<variant>.json`; nothing with --prompt or --chat.
Command: `python -m stages.generate --variant tuned`; to try something, with one variant or both,
`python -m stages.generate --prompt "This movie was"` or `python -m stages.generate --chat`
"""

from __future__ import annotations

import time

from stages.core.cli import Run, click, logger, stage

BOTH = ("baseline", "tuned")


@stage
@click.option(
    "--variant",
    metavar="NAME",
    help="The model to prompt: baseline, tuned, or a name in the setting variants. With --prompt and --chat it may be "
    "left out: then the first two answer.",
)
@click.option("--prompt", multiple=True, metavar="TEXT", help="Continue this and write nothing; may be repeated.")
@click.option("--chat", is_flag=True, help="Converse in the chat template, and write nothing.")
def main(run: Run, variant: str | None, prompt: tuple[str, ...], chat: bool) -> None:
    """Continue the prompts with a variant of the model."""
    if prompt and chat:
        raise click.UsageError("--prompt and --chat do not go together.")
    if not (variant or prompt or chat):
        raise click.UsageError("Missing option '--variant'. It may be left out with --prompt or --chat.")
    names = [variant] if variant else BOTH
    logger.info(f"Loading {' and '.join(names)} ...")
    from stages.core.common import paths
    from stages.core.generate import diversity, prompting
    from stages.core.generate.chat import converse
    from stages.core.generate.sides import open_sides
    from stages.core.generate.texts import InOrder
    from stages.core.load import variants
    from stages.core.presets.formats import format_of
    from stages.core.records.generate import Generation
    from stages.core.tokenize.chat import ChatTemplate

    def write(text: str) -> None:
        click.echo(text, nl=False)

    def ask() -> str | None:
        try:
            return click.prompt("you", default="", show_default=False, prompt_suffix=": ")
        except click.Abort:
            return None

    settings = run.params.generate
    texts, samples, preset = list(prompt or settings.prompts), settings.samples, variants.open_preset(run.paths)
    tokenizer = format_of(preset.manifest.format).load_tokenizer(preset.folder)
    turns = {"empty_thought": preset.architecture.empty_thought, "thinking": settings.thinking}
    template = ChatTemplate(tokenizer, **turns) if chat or settings.chat_template else None
    prompts, stops = prompting.encode(tokenizer, texts, template, settings.system)
    trying = bool(prompt) or chat
    sides = open_sides(run.paths, preset, tokenizer, names, run.params.variants, settings, stops, trying=trying)
    if chat and template:
        logger.info("An empty line begins a new conversation; Ctrl-D ends.")
        converse(sides, template, ask, write, settings.max_tokens, settings.seed, settings.system)
        return
    headings = [text + "\n" * settings.chat_template for text in texts for _ in range(samples)]
    for side in sides:
        if len(sides) > 1:
            write(f"[{side.variant}]\n")
        logger.info(
            f"Generating up to {settings.max_tokens} tokens for each of {len(headings)} texts with {side.variant} ..."
        )
        began = time.perf_counter()
        found, tokens = side.continued(prompts, settings.seed, samples=samples, show=InOrder(headings, write))
        seconds = time.perf_counter() - began
    if prompt or not run.first:
        return
    numbered = [(text, number if samples > 1 else None) for text in texts for number in range(samples)]
    Generation.write_lines(
        run.paths.write(paths.generated(sides[0].variant)),
        [
            Generation(prompt=text, sample=number, text=each)
            for (text, number), each in zip(numbered, found, strict=True)
        ],
    )
    run.write_metrics(f"generate/{sides[0].variant}", diversity.metrics(len(prompts), tokens, seconds))


if __name__ == "__main__":
    main()
