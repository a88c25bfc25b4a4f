"""The tokenizer's files of a Hugging Face folder: `tokenizer.json`, `tokenizer.model`, `tokenizer_config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stages.core.export.vocabulary import json_of_preset, sentencepiece_model
from stages.core.files import atomic_path, write_json, write_text
from stages.core.load.variants import Preset
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


def tokenizer_config(added: list[dict[str, Any]], chat: bool) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`.

    Args:
        added: the tokens that `tokenizer.json` adds; llama.cpp's converter takes from here which are control tokens.
        chat: with the chat template.
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
        **({"chat_template": CHAT_TEMPLATE} if chat else {}),
    }


def write_tokenizer(folder: Path, preset: Preset, chat: bool) -> None:
    """Write the tokenizer's files; the same vocabulary gives the same bytes."""
    model = sentencepiece_model(preset)
    content = json_of_preset(preset, model)
    with atomic_path(folder / HUGGING_FACE_VOCABULARY) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
    # On one line: indented it would be twice the size.
    write_text(folder / JSON_VOCABULARY, json.dumps(content, ensure_ascii=False))
    write_json(folder / "tokenizer_config.json", tokenizer_config(content["added_tokens"], chat))
