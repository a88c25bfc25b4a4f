"""The tokenizer's files of a Hugging Face folder: `tokenizer.json`, `tokenizer.model`, `tokenizer_config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.core.export.vocabulary import json_of_preset, sentencepiece_model
from stages.core.files import atomic_path, write_json, write_text
from stages.core.load.variants import Preset
from stages.core.presets.architecture import Architecture
from stages.core.presets.tokenizer import HUGGING_FACE_VOCABULARY, JSON_VOCABULARY

CHAT_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = (messages[0]['content'] | trim) + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set first = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') + (message['content'] | trim) + \
'<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
"""Gemma's turns as `stages.core.tokenize.chat` lays them out, a system's text before the first prompt."""

CHAT_TEMPLATE_OF_GEMMA4 = """\
{{ bos_token }}
{%- set thinking = enable_thinking is defined and enable_thinking -%}
{%- set system = messages[0]['role'] in ['system', 'developer'] -%}
{%- if thinking or system -%}
    {{ '<|turn>system\\n' + ('<|think|>\\n' if thinking else '') }}
    {{- messages[0]['content'] | trim if system else '' }}
    {{- '<turn|>\\n' }}
{%- endif -%}
{%- set thought = '' if thinking else 'EMPTY_THOUGHT' -%}
{%- for message in (messages[1:] if system else messages) -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set begin = 'user\\n' if message['role'] == 'user' else 'model\\n' + thought -%}
    {{ '<|turn>' + begin + (message['content'] | trim) + '<turn|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|turn>model\\n' + thought }}
{%- endif -%}
"""
"""Gemma 4's turns, to be filled with the empty thought of models that have one."""
EMPTY_THOUGHT = "<|channel>thought\\n<channel|>"


def chat_template(architecture: Architecture) -> str:
    """Return the template of the turns that a model was trained on, in Jinja."""
    if architecture.class_name != "Gemma4Backbone":
        return CHAT_TEMPLATE
    return CHAT_TEMPLATE_OF_GEMMA4.replace("EMPTY_THOUGHT", EMPTY_THOUGHT if architecture.empty_thought else "")


def tokenizer_config(added: list[dict[str, Any]], template: str | None) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`.

    Args:
        added: the tokens that `tokenizer.json` adds; llama.cpp's converter takes from here which are control tokens.
        template: of chats; None: the model has none.
    """
    decoder = {str(each["id"]): {key: value for key, value in each.items() if key != "id"} for each in added}
    return {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "use_default_system_prompt": False,
        "sp_model_kwargs": None,
        "model_max_length": 10**30,
        "added_tokens_decoder": decoder,
        **({"chat_template": template} if template else {}),
    }


def write_tokenizer(folder: Path, preset: Preset, chat: bool) -> None:
    """Write the tokenizer's files; the same vocabulary gives the same bytes."""
    model = sentencepiece_model(preset)
    content = json_of_preset(preset, model)
    with atomic_path(folder / HUGGING_FACE_VOCABULARY) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
    # On one line: indented it would be twice the size.
    write_text(folder / JSON_VOCABULARY, json.dumps(content, ensure_ascii=False))
    template = chat_template(preset.architecture) if chat else None
    write_json(folder / "tokenizer_config.json", tokenizer_config(content["added_tokens"], template))
