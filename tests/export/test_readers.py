"""What export writes, in transformers and PEFT themselves: logits and token ids of the tuned model.

They need packages that the pipeline does not: `pip install -r requirements-readers.txt`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from stages.core.config.schema import Export
from stages.core.export import exporting, huggingface, peft, proof, verifying
from stages.core.export.hugging_face_tokenizer import write_tokenizer
from stages.core.export.safetensors_file import write_model
from stages.core.export.tensors import hugging_face_shapes, hugging_face_tensors
from stages.core.export.tuned import TrainedWeights
from stages.core.presets.formats import format_of
from stages.core.records.layout import LoraConfig
from stages.core.tokenize.chat import ChatTemplate
from stages.core.tokenize.control_tokens import ControlTokens
from tests.support.hf_folder import write_hugging_face
from tests.support.repository import FAMILIES
from tests.support.tiny_models import open_tiny
from tests.support.tiny_presets import tiny_reviews

# torch's compiler, which nothing here uses, ends the process where TensorFlow has been imported before it.
sys.modules.setdefault("triton", None)
torch = pytest.importorskip("torch", reason="needs torch (requirements-readers.txt)")
transformers = pytest.importorskip("transformers", reason="needs transformers (requirements-readers.txt)")

KINDS = [(family, kind) for family in FAMILIES for kind in ("lora", "full")]
TEXTS = [
    *tiny_reviews(6),
    proof.TEXT,
    *("", " ", "   ", "\n", "\t", "\x00\x01", "a\x00b", " " * 70, "\n" * 40, "<bos>", "<eos><pad><unk>"),
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "\N{POPCORN}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{ROCKET}",
    "\N{LOWER ONE EIGHTH BLOCK}\N{LOWER ONE EIGHTH BLOCK} \N{LOWER ONE EIGHTH BLOCK}",
]


def write(case, folder: Path, *, chat: bool = False, ends: tuple[int, ...] = (1,)) -> Path:
    with case.tuned.open_merged() as weights:
        huggingface.write_folder(folder, case.tuned.preset, weights, "float32", chat=chat, ends=list(ends))
    return folder


def logits_of(model, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


def pretrained(folder: Path, **settings):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **settings
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", KINDS, ids="-".join)
def test_transformers_computes_the_tuned_model_s_logits(cases, case, attention, tmp_path):
    if (case[0], attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers' sdpa leaves Gemma 2's soft caps of attention out")
    found = cases[case]
    model = pretrained(write(found, tmp_path), attn_implementation=attention)
    assert (
        type(model).__name__
        == {
            "gemma": "GemmaForCausalLM",
            "gemma2": "Gemma2ForCausalLM",
            "gemma3": "Gemma3ForCausalLM",
            "gemma4": "Gemma4ForCausalLM",
        }[found.family]
    )
    assert np.abs(logits_of(model, found.ids) - found.logits).max() < 1e-3
    assert np.abs(found.base - found.logits).max() > 1


def test_transformers_reads_several_files_by_their_index(cases, tmp_path):
    found = cases["gemma3", "lora"]
    whole = pretrained(write(found, tmp_path)).state_dict()
    (tmp_path / "model.safetensors").unlink()
    with found.tuned.open_merged() as weights:
        shapes = hugging_face_shapes(found.tuned.preset.architecture)
        write_model(tmp_path, shapes, np.dtype("f4"), hugging_face_tensors(weights), largest=200_000)
    parts = pretrained(tmp_path).state_dict()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_every_text_our_token_ids_after_bos(cases, family, tmp_path):
    preset = cases[family, "lora"].tuned.preset
    write_tokenizer(tmp_path, preset, chat=False)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family.replace("gemma3", "gemma3_text")}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    own = ControlTokens(format_of("keras").load_tokenizer(preset.folder))
    for text, ids in zip(TEXTS, own.as_tokens(TEXTS), strict=True):
        assert tokenizer(text)["input_ids"] == [2, *ids], text
    assert tokenizer.decode(tokenizer("A b  c\n", add_special_tokens=False)["input_ids"]) == "A b  c\n"


def test_a_chat_model_lays_turns_out_as_in_training_and_ends_with_its_turn(cases, tmp_path):
    case = cases["gemma3", "lora"]
    own = format_of("keras").load_tokenizer(case.tuned.preset.folder)
    template = ChatTemplate(own)
    job = case.job("huggingface", chat=True)
    assert job.ends == [1, template.end]
    tokenizer = transformers.AutoTokenizer.from_pretrained(write(case, tmp_path, chat=True, ends=tuple(job.ends)))
    turns = ["  What is it? ", "A film.\n", "Good?", "See it twice!"]
    messages = [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(turns)]

    def ids(given, **more):
        return tokenizer.apply_chat_template(given, return_dict=False, **more)

    assert ids(messages[:1], add_generation_prompt=True) == template.prompts(turns[:1])[0]
    (laid_out,) = template.conversations([turns])
    assert ids(messages) == [*(number for turn in laid_out for number in turn), *own.encode("\n")]
    system = [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "Hi"}]
    assert ids(system, add_generation_prompt=True) == template.prompts(["Be kind.\n\nHi"])[0]
    model = pretrained(tmp_path)
    assert model.generation_config.eos_token_id == [1, template.end]
    assert (model.generation_config.top_k, model.generation_config.top_p) == (64, 0.95)


def test_a_chat_model_of_gemma_4_lays_its_turns_out_as_in_training(cases, tmp_path):
    case = cases["gemma4", "lora"]
    own = format_of("keras").load_tokenizer(case.tuned.preset.folder)
    template = ChatTemplate(own, empty_thought=case.tuned.preset.architecture.empty_thought)
    thinking = ChatTemplate(own, empty_thought=True, thinking=True)
    job = case.job("huggingface", chat=True)
    assert job.ends == [own.piece_id(piece) for piece in ("<eos>", "<turn|>", "<|tool_response>")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(write(case, tmp_path, chat=True, ends=tuple(job.ends)))
    turns = ["  What is it? ", "A film.\n", "Good?", "See it twice!"]
    messages = [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(turns)]

    def ids(given, **more):
        return tokenizer.apply_chat_template(given, return_dict=False, **more)

    (laid_out,) = template.conversations([turns], ["Be kind."])
    system = {"role": "system", "content": " Be kind. "}
    assert ids([system, *messages]) == [*(number for turn in laid_out for number in turn), *own.encode("\n")]
    for given, said in ((messages[:1], None), ([system, messages[0]], "Be kind.")):
        assert ids(given, add_generation_prompt=True) == template.prompts(turns[:1], [said])[0]
        asked = ids(given, add_generation_prompt=True, enable_thinking=True)
        assert asked == thinking.prompts(turns[:1], [said])[0]


def test_a_preset_with_a_tokenizer_json_keeps_it(cases, tmp_path):
    case = cases["gemma", "lora"]
    given = write_hugging_face(case.tuned.preset.folder, tmp_path / "given", "gemma")
    write_tokenizer(given, case.tuned.preset, chat=False)
    (given / "tokenizer.model").unlink()
    content = json.loads((given / "tokenizer.json").read_text())
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (given / "tokenizer.json").write_text(json.dumps({**content, "truncation": truncation}))
    write_tokenizer(tmp_path / "written", open_tiny(given), chat=False)
    again = json.loads((tmp_path / "written" / "tokenizer.json").read_text())
    assert again == content
    (tmp_path / "written" / "tokenizer.json").unlink()
    from_model = format_of("safetensors").load_tokenizer(tmp_path / "written")
    own = format_of("keras").load_tokenizer(case.tuned.preset.folder)
    assert from_model.encode_all(TEXTS) == own.encode_all(TEXTS)


# --- PEFT. ---


@pytest.fixture
def library():
    return pytest.importorskip("peft", reason="needs peft (requirements-readers.txt)")


def base_of(case, folder: Path):
    """The model before tuning, in transformers."""
    before = dataclasses.replace(case.tuned, trained=TrainedWeights(None), lora=LoraConfig(0))
    return pretrained(write(dataclasses.replace(case, tuned=before), folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_puts_the_adapter_on_the_base_and_computes_the_tuned_model_s_logits(cases, family, tmp_path, library):
    case = cases[family, "lora"]
    peft.write_adapter(tmp_path / "adapter", case.tuned, "text", "google/x")
    base = base_of(case, tmp_path / "base")
    assert np.abs(logits_of(base, case.ids) - case.base).max() < 1e-3
    model = library.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert np.abs(logits_of(model, case.ids) - case.logits).max() < 1e-3
    merged = model.merge_and_unload()
    assert np.abs(logits_of(merged, case.ids) - case.logits).max() < 1e-3


def test_peft_puts_the_vision_names_on_a_base_with_a_vision_tower(cases, tmp_path, library, recwarn):
    case = cases["gemma3", "lora"]
    text = base_of(case, tmp_path / "base")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text.config.to_dict(),
        vision_config={**tower, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    whole = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.weight = whole.model.language_model.embed_tokens.weight
    assert np.abs(logits_of(whole, case.ids) - case.base).max() < 1e-3
    peft.write_adapter(tmp_path / "vision", case.tuned, "vision", "google/x")
    model = library.PeftModel.from_pretrained(whole, str(tmp_path / "vision")).eval()
    assert np.abs(logits_of(model, case.ids) - case.logits).max() < 1e-3
    assert not any("lora" in name and "vision_tower" in name for name, _ in model.named_parameters())
    assert not [each for each in recwarn if "missing adapter keys" in str(each.message)]


# --- --verify. ---


@pytest.mark.parametrize("case", KINDS, ids="-".join)
def test_verify_reads_every_format_by_its_own_library(cases, case, tmp_path, facts):
    pytest.importorskip("peft", reason="needs peft (requirements-readers.txt)")
    job = cases[case].job("peft", "huggingface", "keras")
    with exporting.reference(job) as compared:
        exporting.export(compared, tmp_path, facts)
        lines = list(verifying.verify(compared, tmp_path))
    assert [line.partition(":")[0] for line in lines] == ["peft", "huggingface", "keras"]
    by = {"lora": "by peft the logits differ by at most", "full": "left out, every weight was trained"}
    assert by[case[1]] in lines[0]
    assert "by transformers the logits differ by at most" in lines[1]
    assert "by keras_hub the logits differ by at most" in lines[2]


def test_verify_finds_an_adapter_of_another_model(cases, tmp_path, facts):
    pytest.importorskip("peft", reason="needs peft (requirements-readers.txt)")
    job = cases["gemma", "lora"].job("peft")
    with exporting.reference(job) as compared:
        exporting.export(compared, tmp_path, facts)
        config = tmp_path / "peft" / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 12', '"lora_alpha": 6'))
        with pytest.raises(exporting.StageError, match="models/export/peft, read by peft, must compute"):
            list(verifying.verify(compared, tmp_path))


def test_the_settings_name_each_format_once():
    with pytest.raises(ValueError, match="formats must name each format once"):
        Export(formats=["peft", "peft"], base="text", dtype="float32", gguf_type="F32")
