"""A conversation at the terminal, in Gemma's chat template, with one variant or several that each keep their own.

Purpose: to hear both sides of a fine-tuning answer the same message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stages.core.generate.sides import Side
from stages.core.generate.texts import visible
from stages.core.tokenize.chat import ChatTemplate

# Tokens of a conversation, answer included: what Gemma 1 and 2 were trained on. Memory and time grow with it.
LONGEST = 8192


def converse(
    sides: Sequence[Side],
    template: ChatTemplate,
    ask: Callable[[], str | None],
    write: Callable[[str], None],
    max_tokens: int,
    seed: int,
    system: str | None = None,
) -> None:
    """Answer messages until there are none.

    Args:
        sides: those who answer, each in its own conversation.
        template: of their turns.
        ask: returns the next message, None at the end; an empty one begins a new conversation.
        write: puts out a piece of text.
        max_tokens: of an answer.
        seed: of the first answer's sampling; that of answer n (from 0) is `seed` + n.
        system: what the system says before the first message.
    """
    histories: list[list[int]] = [[] for _ in sides]
    asked = 0
    while (message := ask()) is not None:
        if not message.strip():
            histories = [[] for _ in sides]
            write("A new conversation.\n")
            continue
        for place, side in enumerate(sides):
            before = histories[place]
            begun = template.prompts([message], [system])[0]
            prompt = [*before, *template.later_prompts([message])[0]] if before else begun
            if len(prompt) + max_tokens > LONGEST:
                prompt = begun
                write(f"({side.variant}: the conversation had more than {LONGEST:,} tokens and begins anew.)\n")
            if len(prompt) + max_tokens > LONGEST:
                write(f"The message is too long: {len(prompt):,} tokens, of at most {LONGEST - max_tokens:,}.\n")
                break
            write(f"{side.variant}: ")
            _, rows = side.continued([prompt], (seed + asked) % 2**32, show=lambda _, text, __: write(visible(text)))
            write("\n")
            histories[place] = template.answered(prompt, rows[0])
        asked += 1
