"""The Modelfile with which `ollama create` takes a GGUF file in.

It has no `ADAPTER`: Ollama refuses the instruction since 0.34.1, so the GGUF must be of the merged model. Source of the
form: https://docs.ollama.com/modelfile; of the template: that of `gemma3` in Ollama's library.
"""

from __future__ import annotations

from stages.core.presets.architecture import Architecture
from stages.core.records.manifest import License
from stages.core.tokenize.chat import CHANNEL, CHANNEL_END, GEMMA, GEMMA4, Turns

# In Go's language: of each message a turn, the last one left open.
TEMPLATE = """{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "assistant" }}STARTmodel
THOUGHT{{ .Content }}{{ if not $last }}END
{{ end }}
{{- else if or (eq .Role "user") (eq .Role "system") }}STARTROLE
{{ .Content }}END
{{ if $last }}STARTmodel
THOUGHT{{ end }}
{{- end }}
{{- end }}"""
PLAIN = "{{ .Prompt }}"


def turns_of(architecture: Architecture) -> Turns:
    """Return the control pieces of a model's chat template."""
    return GEMMA4 if architecture.class_name == "Gemma4Backbone" else GEMMA


def _template(architecture: Architecture) -> str:
    """Return the chat template; a system's text is a user's turn where Gemma was trained so."""
    turns = turns_of(architecture)
    parts = {
        "START": turns.start,
        "END": turns.end,
        "ROLE": "{{ .Role }}" if turns is GEMMA4 else "user",
        "THOUGHT": f"{CHANNEL}thought\n{CHANNEL_END}" if architecture.empty_thought else "",
    }
    text = TEMPLATE
    for name, part in parts.items():
        text = text.replace(name, part)
    return text


def modelfile(file: str, terms: License, chat_of: Architecture | None) -> str:
    """Return the text of a Modelfile.

    Args:
        file: the name of the GGUF file next to it.
        terms: that the weights come under.
        chat_of: of the model, if it was trained in Gemma's chat template; None: it continues the prompt as it is.
    """
    lines = [f"FROM ./{file}", f'TEMPLATE """{_template(chat_of) if chat_of else PLAIN}"""']
    if chat_of:
        turns = turns_of(chat_of)
        lines += [f'PARAMETER stop "{piece}"' for piece in (turns.end, turns.stop) if piece is not None]
    # Those that Google recommends for Gemma 3 and 4, and that their generation_config.json has.
    lines += ["PARAMETER temperature 1.0", "PARAMETER top_k 64", "PARAMETER top_p 0.95"]
    lines.append(f'LICENSE """{terms.name}: {terms.url}"""')
    return "\n".join(lines) + "\n"
