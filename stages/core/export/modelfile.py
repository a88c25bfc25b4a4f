"""The Modelfile with which `ollama create` takes a GGUF file in.

It has no `ADAPTER`: Ollama refuses the instruction since 0.34.1, so the GGUF must be of the merged model. Source of the
form: https://docs.ollama.com/modelfile; of the template: that of `gemma3` in Ollama's library.
"""

from __future__ import annotations

from stages.core.records.manifest import License
from stages.core.tokenize.chat import GEMMA

START, END = GEMMA.start, GEMMA.end
# In Go's language: of each message a turn (a system message is a user's, as Gemma was trained), the last one left open.
TURNS = f"""{{{{- range $i, $_ := .Messages }}}}
{{{{- $last := eq (len (slice $.Messages $i)) 1 }}}}
{{{{- if or (eq .Role "user") (eq .Role "system") }}}}{START}user
{{{{ .Content }}}}{END}
{{{{ if $last }}}}{START}model
{{{{ end }}}}
{{{{- else if eq .Role "assistant" }}}}{START}model
{{{{ .Content }}}}{{{{ if not $last }}}}{END}
{{{{ end }}}}
{{{{- end }}}}
{{{{- end }}}}"""
PLAIN = "{{ .Prompt }}"


def modelfile(file: str, terms: License, *, turns: bool) -> str:
    """Return the text of a Modelfile.

    Args:
        file: the name of the GGUF file next to it.
        terms: that the weights come under.
        turns: whether the model was trained in Gemma's chat template: else it continues the prompt as it is.
    """
    lines = [f"FROM ./{file}", f'TEMPLATE """{TURNS if turns else PLAIN}"""']
    if turns:
        lines.append(f'PARAMETER stop "{END}"')
    # Those that Google recommends for Gemma 3, and that its generation_config.json has.
    lines += ["PARAMETER temperature 1.0", "PARAMETER top_k 64", "PARAMETER top_p 0.95"]
    lines.append(f'LICENSE """{terms.name}: {terms.url}"""')
    return "\n".join(lines) + "\n"
