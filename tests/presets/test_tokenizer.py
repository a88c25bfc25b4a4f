"""Our tokenizer, by SentencePiece alone, beside keras-hub's own."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from stages.core.common.errors import StageError
from stages.core.presets.formats import format_of
from stages.core.presets.gguf_tokenizer import tokenizer_proto
from stages.core.presets.tokenizer import KERAS_VOCABULARY, Tokenizer, holds_vocabulary
from tests.support import tiny_presets, tokenizer_json
from tests.support.repository import ROOT

# Some compare with keras-hub's own, which has to be imported with the devices set up.
pytestmark = pytest.mark.usefixtures("devices")

TEXTS = [
    *tiny_presets.tiny_reviews(24),
    "",
    " ",
    "two  spaces,   three, and a trailing one ",
    "\n",
    "one line\nanother\n\nafter an empty one\n\n\n",
    "a tab\tand\r\na carriage return",
    "Caf\N{LATIN SMALL LETTER E WITH ACUTE} e\N{COMBINING ACUTE ACCENT} \N{EM DASH} \N{HORIZONTAL ELLIPSIS}",
    "\N{CJK UNIFIED IDEOGRAPH-6620}\N{CJK UNIFIED IDEOGRAPH-753B} \N{CYRILLIC CAPITAL LETTER EF}",
    "\N{POPCORN}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET}\N{WHITE MEDIUM STAR}\N{VARIATION SELECTOR-16}",
    "<br /><br />I give it 3.14159 stars in 1999",
    "\N{LOWER ONE EIGHTH BLOCK}already escaped\N{LOWER ONE EIGHTH BLOCK}\N{LOWER ONE EIGHTH BLOCK}",
]


def keras_tokenizer(family: str, proto: bytes):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras_hub

    if family == "gemma3":
        return keras_hub.models.Gemma3Tokenizer(proto, has_vision_tokens=False)
    return keras_hub.models.GemmaTokenizer(proto)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_a_preset_s_ids_and_texts_are_those_of_keras_hub(tmp_path, family):
    ours = format_of("keras").load_tokenizer(tiny_presets.write_tiny_preset(tmp_path, family))
    theirs = keras_tokenizer(family, (tmp_path / KERAS_VOCABULARY).read_bytes())
    assert (ours.pad, ours.eos, ours.bos) == (theirs.pad_token_id, theirs.end_token_id, theirs.start_token_id)
    assert (ours.pad, ours.eos, ours.bos) == (0, 1, 2)
    assert ours.vocabulary_size == theirs.vocabulary_size()
    for text in TEXTS:
        ids = [int(number) for number in theirs(text)]
        assert ours.encode(text) == ids, text
        # SentencePiece writes spaces as U+2581 inside, so a text that has that character comes back with spaces.
        assert ours.decode(ids) == theirs.detokenize(ids) == text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")


def test_the_embedded_ids_are_those_of_keras_hub(real_gguf):
    ours, theirs = (
        format_of("gguf").load_tokenizer(real_gguf.parent),
        keras_tokenizer("gemma3", tokenizer_proto(real_gguf)),
    )
    assert (ours.pad, ours.eos, ours.bos, ours.vocabulary_size) == (0, 1, 2, 262_144)
    for text in TEXTS:
        ids = [int(number) for number in theirs(text)]
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.detokenize(ids)
        assert ours.decode([ours.bos, *ids, ours.eos, ours.pad]) == ours.decode(ids)


def test_many_texts_at_once_give_the_ids_of_each_alone():
    tokenizer = Tokenizer.from_proto(tiny_presets.tiny_proto())
    assert tokenizer.encode_all(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_all([]) == []


def test_special_tokens_are_neither_added_by_encode_nor_shown_by_decode():
    tokenizer = Tokenizer.from_proto(tiny_presets.tiny_proto())
    ids = tokenizer.encode("This was")
    assert not {tokenizer.pad, tokenizer.bos, tokenizer.eos} & set(ids)
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos, tokenizer.pad]) == "This was"
    # A review that spells a special token must not end itself.
    assert not {tokenizer.pad, tokenizer.bos, tokenizer.eos} & set(tokenizer.encode("<eos> <bos><pad>"))


@pytest.mark.parametrize("proto", [b"", b"not a model", bytes(64)])
def test_bytes_that_are_no_vocabulary_are_a_users_error(proto):
    with pytest.raises(StageError, match="SentencePiece model"):
        Tokenizer.from_proto(proto)


def test_a_vocabulary_without_gemma_s_special_pieces_is_refused():
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["to be or not to be"]), model_writer=writer, vocab_size=11, minloglevel=2
    )
    with pytest.raises(StageError, match="<pad>"):
        Tokenizer.from_proto(writer.getvalue())


def test_a_folder_without_a_vocabulary_is_a_users_error(tmp_path):
    with pytest.raises(StageError, match=KERAS_VOCABULARY):
        format_of("keras").load_tokenizer(tmp_path)
    with pytest.raises(StageError, match=r"one \.gguf file. Received: 0"):
        format_of("gguf").load_tokenizer(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(StageError, match=r"one \.gguf file. Received: 2"):
        format_of("gguf").load_tokenizer(tmp_path)


def test_only_the_vocabulary_of_a_preset_counts_as_one():
    assert holds_vocabulary(KERAS_VOCABULARY)
    assert holds_vocabulary("gemma-3-270m-q4_k_m.gguf")
    assert not holds_vocabulary("model.weights.h5")


def test_the_tokenizer_imports_neither_tensorflow_nor_keras():
    program = (
        "import sys; from stages.core.presets.tokenizer import Tokenizer\n"
        "from tests.support.tiny_presets import tiny_proto\n"
        "Tokenizer.from_proto(tiny_proto()).encode('x')\n"
        "sys.exit(', '.join({'tensorflow', 'keras', 'jax'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def json_folder(folder: Path, change=lambda content: None) -> Path:
    """A folder with a `tokenizer.json` of the recorded vocabulary."""
    proto = base64.b64decode(json.loads(tokenizer_json.RECORDED.read_text())["proto"])
    content = tokenizer_json.tokenizer_json(proto)
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_a_tokenizer_json_with_added_tokens_gives_transformers_ids(tmp_path):
    tokenizer = format_of("safetensors").load_tokenizer(json_folder(tmp_path))
    ids = json.loads(tokenizer_json.RECORDED.read_text())["ids"]
    assert [tokenizer.encode(text) for text in tokenizer_json.TEXTS] == ids
    assert tokenizer.encode_all(tokenizer_json.TEXTS) == ids
    assert [tokenizer.decode(each) for each in ids] == tokenizer_json.TEXTS
    assert (tokenizer.pad, tokenizer.eos, tokenizer.bos) == (0, 1, 2)
    assert tokenizer.piece_id("[TOOL]") == tokenizer.vocabulary_size - 1 == 515


def test_no_text_spells_a_control_token_whatever_the_vocabulary_is_kept_in(tmp_path):
    ours = format_of("safetensors").load_tokenizer(json_folder(tmp_path))
    recorded = json.loads(tokenizer_json.RECORDED.read_text())
    pieces = Tokenizer.from_proto(base64.b64decode(recorded["proto"]))
    text = "<bos>a<eos><pad><unk><image_soft_token>"
    assert ours.encode(text) == pieces.encode(text)
    assert ours.decode([ours.bos, *ours.encode("Hi"), ours.eos, ours.pad, 10**6]) == "Hi"


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("model"),
        lambda content: content["model"].update(vocab=[]),
        lambda content: content["model"].update(merges=[["x", 1]]),
        lambda content: content.update(added_tokens=[{"id": 700, "content": "<new>"}]),
        lambda content: content["added_tokens"][-1].update(id=900),
        lambda content: [content["model"]["vocab"].pop("<bos>"), content["added_tokens"].pop(2)],
    ],
)
def test_a_tokenizer_json_that_cannot_be_read_as_it_stands_is_a_users_error(tmp_path, change):
    with pytest.raises(StageError):
        format_of("safetensors").load_tokenizer(json_folder(tmp_path, change))


def test_tokens_that_were_added_beside_a_sentencepiece_model_are_not_left_out(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tiny_presets.tiny_proto())
    (tmp_path / "added_tokens.json").write_text('{"<image_soft_token>": 512}')
    assert format_of("safetensors").load_tokenizer(tmp_path).vocabulary_size == 512
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 512}')
    with pytest.raises(StageError, match=r"Received: <\|im_start\|> in"):
        format_of("safetensors").load_tokenizer(tmp_path)
