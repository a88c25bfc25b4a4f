"""Adapters that PEFT itself makes, and the logits that it gives with them."""

from __future__ import annotations

import numpy as np
import pytest

from stages.core.adapters.adapted import load_adapted
from stages.core.common.paths import Paths
from tests.support.hf_folder import change_config, write_hugging_face
from tests.support.repository import FAMILIES
from tests.support.tiny_models import describe, open_tiny
from tests.support.tuned_models import logits

# Before TensorFlow, after which torch ends the process.
torch = pytest.importorskip("torch", reason="needs torch (requirements-readers.txt)")
transformers = pytest.importorskip("transformers", reason="needs transformers (requirements-readers.txt)")
peft = pytest.importorskip("peft", reason="needs PEFT (requirements-readers.txt)")

pytestmark = pytest.mark.usefixtures("devices")

IDS = [2, *np.random.default_rng(1).integers(4, 512, 30).tolist()]
PATTERNS = {"rank_pattern": {"down_proj": 5, r"layers\.1\.self_attn\.q_proj": 2}, "alpha_pattern": {"v_proj": 32}}
SETTINGS = {
    "gemma": {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 16},
    "gemma2": {"target_modules": "all-linear", "lora_alpha": 7, "use_rslora": True},
    "gemma3": {"target_modules": r".*\.(self_attn|mlp)\.\w+_proj", "lora_alpha": 12, **PATTERNS},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_peft_made_gives_peft_s_logits(presets, tmp_path, family):
    base = write_hugging_face(presets[family], tmp_path / "base", family)
    if family == "gemma":
        change_config(base, hidden_act="gelu_pytorch_tanh")
    if family == "gemma2":
        change_config(base, final_logit_softcapping=30.0, attn_logit_softcapping=50.0)
    torch.manual_seed(0)
    whole = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    settings = peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **SETTINGS[family])
    model = peft.get_peft_model(whole, settings).eval()
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
        plain = model.disable_adapter
        with plain():
            before = model(torch.tensor([IDS])).logits[0].numpy()
    model.save_pretrained(tmp_path / "adapter")

    preset = open_tiny(base)
    describe(preset, (1, 1)).write(tmp_path / "models/baseline/model.json")
    loaded = load_adapted(Paths(tmp_path, tmp_path), tmp_path / "adapter", preset)
    found = logits(loaded, IDS)
    assert np.abs(expected - before).max() > 1
    assert np.abs(found - expected).max() < 1e-3
    assert (found.argmax(-1) == expected.argmax(-1)).all()
