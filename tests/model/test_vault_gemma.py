"""VaultGemma, a Gemma 2 without norms after its layers, against transformers: read from its files, and trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stages.core.presets.hf_config import read_architecture
from tests.support.hf_folder import change_config, write_hugging_face
from tests.support.passes import hidden_states, logits, loss_and_gradients
from tests.support.tiny_models import load_tiny, sequences
from tests.support.tiny_presets import write_tiny_preset

HEAD, WINDOW, LENGTH = 32, 8, 32
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
FORMS = {
    # As Google trained it; and as transformers' own defaults are.
    "full attention": {"layer_types": ["full_attention"] * 2, **dict.fromkeys(CAPS)},
    "windows and caps": {"layer_types": ["sliding_attention", "full_attention"], **CAPS},
}
ALIKE = {"rtol": 1e-4, "atol": 3e-5}


@pytest.fixture(params=FORMS)
def folder(request, devices, tmp_path) -> Path:
    """A plain checkpoint of a tiny one, with the names that transformers gives its norms."""
    windowed = request.param != "full attention"
    more = {"attention_logit_soft_cap": 50.0, "final_logit_soft_cap": 30.0} if windowed else {}
    more |= {"head_dim": HEAD, "use_sliding_window_attention": windowed, "sliding_window_size": WINDOW}
    preset = write_tiny_preset(tmp_path / "preset", "gemma", **more)
    folder = write_hugging_face(preset, tmp_path / "hf", "gemma")
    tensors = load_file(folder / "model.safetensors")
    names = {name: name.replace("post_attention_layernorm", "pre_feedforward_layernorm") for name in tensors}
    save_file({names[name]: each for name, each in tensors.items()}, folder / "model.safetensors")
    said = {"model_type": "vaultgemma", "architectures": ["VaultGemmaForCausalLM"], "hidden_act": None}
    said |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": HEAD, "sliding_window": WINDOW}
    change_config(folder, **said)
    # null is written out: transformers has caps where nothing is said.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | FORMS[request.param]))
    return folder


def test_values_and_gradients_are_transformers(folder):
    # torch's compiler, which nothing here uses, ends the process where TensorFlow has been imported before it.
    sys.modules.setdefault("triton", None)
    torch = pytest.importorskip("torch", reason="needs torch (requirements-readers.txt)")
    transformers = pytest.importorskip("transformers", reason="needs transformers (requirements-readers.txt)")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    batch, model = sequences(2, LENGTH), load_tiny(folder, (1, 2), rank=0)
    # The packed texts of ours are rows of theirs.
    rows = {name: each.reshape(4, LENGTH // 2) for name, each in batch.items()}
    z = theirs(torch.tensor(rows["token_ids"]).long(), use_cache=False).logits
    hidden = hidden_states(model, batch)
    np.testing.assert_allclose(
        logits(model, hidden.reshape(-1, hidden.shape[-1])), z.detach().flatten(0, 1).numpy(), **ALIKE
    )
    targets, weights = (torch.tensor(rows[name]).flatten() for name in ("target_ids", "weights"))
    losses = torch.nn.functional.cross_entropy(z.flatten(0, 1), targets.long(), reduction="none")
    wanted = (losses * weights).sum() / weights.sum()
    wanted.backward()
    loss, gradients = loss_and_gradients(model, batch)
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    for path, tensor in {
        "token_embedding/embeddings": theirs.model.embed_tokens.weight.grad,
        "decoder_block_0/pre_ffw_norm/scale": theirs.model.layers[0].pre_feedforward_layernorm.weight.grad,
        "decoder_block_1/ffw_gating/kernel": theirs.model.layers[1].mlp.gate_proj.weight.grad.T,
    }.items():
        largest = tensor.abs().max().item()
        np.testing.assert_allclose(gradients[path] / largest, tensor.numpy() / largest, **ALIKE, err_msg=path)


def test_its_windows_and_caps_are_what_its_own_files_say(folder):
    config = read_architecture(folder).config
    windowed = config["use_sliding_window_attention"]
    assert config.get("sliding_window_size") == (WINDOW if windowed else None)
    assert config["final_logit_soft_cap"] == (30.0 if windowed else None)
    assert not config["use_post_ffw_norm"] and not config["use_post_attention_norm"]
