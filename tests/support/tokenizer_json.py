"""A `tokenizer.json` like Gemma's, made from the tiny SentencePiece vocabulary, and the ids that transformers gives it.

Command (where transformers is installed): `python -m tests.support.tokenizer_json` writes
`tests/data/tokenizer_json_ids.json`.
"""

from __future__ import annotations

import base64
import json
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece

from stages.core.export.vocabulary import BPE
from tests.support.repository import DATA

RECORDED = DATA / "tokenizer_json_ids.json"
ADDED = ("<|im_start|>", "<|im_end|>", "<image_soft_token>", "[TOOL]")
TEXTS = [
    *(
        "This was an absolutely terrible movie.",
        "",
        " ",
        "two  spaces,   three ",
        "\n",
        "one\n\nafter\n\n\n",
        "a\tb\r\nc",
    ),
    *(
        "Caf\u00e9 e\u0301 \u2014 \u2026",
        "\u6620\u753b \u0424",
        "\U0001f37f\U0001f469\u200d\U0001f680",
        "<br />3.14 in 1999",
    ),
    *("<|im_start|>user\nHello there<|im_end|>\n", "x[TOOL]y", "<|im_start", "<start_of_turn>user\nHi<end_of_turn>"),
]


def tokenizer_json(proto: bytes, added: tuple[str, ...] = ADDED) -> dict[str, Any]:
    """The file's content, as transformers' converter writes it of a SentencePiece model."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    words = [pieces.id_to_piece(number) for number in range(pieces.vocab_size())]
    ids = {word: number for number, word in enumerate(words)}
    merges = [
        (-pieces.get_score(number), word[:cut], word[cut:])
        for number, word in enumerate(words)
        for cut in range(1, len(word))
        if not pieces.is_control(number) and word[:cut] in ids and word[cut:] in ids
    ]
    special = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<start_of_turn>",
        "<end_of_turn>",
        "\n",
        "\n\n",
        "\u2581\u2581",
        *added,
    ]
    for word in added:
        ids.setdefault(word, len(ids))
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [{"id": ids[word], "content": word, **token} for word in sorted(special, key=ids.__getitem__)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            **BPE,
            "vocab": {word: number for word, number in ids.items() if word not in added},
            "merges": [[left, right] for _, left, right in sorted(merges)],
        },
    }


def record(proto: bytes) -> None:
    """Write the vocabulary, and the ids that transformers gives the texts with it."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(json.dumps(tokenizer_json(proto)))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
        ids = [tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"] for text in TEXTS]
    content = {"transformers": transformers.__version__, "proto": base64.b64encode(proto).decode(), "ids": ids}
    RECORDED.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    from tests.support.tiny_presets import tiny_proto

    record(tiny_proto())
