"""A repository of a tiny Gemma at Hugging Face, in each form."""

from __future__ import annotations

import json

from tests.support.fake_preset import preset_files
from tests.support.hf_folder import hugging_face_files
from tests.support.tiny_presets import tiny_proto

REPO = "google/gemma-tiny"
PRESET = f"hf://{REPO}"
COMMIT = "a" * 40
FOLDER = "presets/google--gemma-tiny-huggingface-" + "a" * 40
OTHERS = {
    ".gitattributes": b"",
    "README.md": b"# A model",
    "pytorch_model.bin": b"a pickle",
    "modeling_gemma.py": b"raise SystemExit",
}
PLAIN = OTHERS | hugging_face_files()
WEIGHTS = PLAIN["model.safetensors"]
SPLIT_PLAIN = OTHERS | hugging_face_files(files=2)
KERAS = {"README.md": b"# A preset", "task.json": b"{}"} | preset_files()
SHARDS = ["model_00000.weights.h5", "model_00001.weights.h5"]
SPLIT_KERAS = {"README.md": b"# A preset", "task.json": b"{}"} | preset_files(SHARDS)
SPLIT_KERAS["model.weights.json"] = json.dumps({"weight_map": {"/layers/a/vars": SHARDS}}).encode()
ANOTHER_VOCABULARY = tiny_proto(control=True)
LEFT_OUT = {".gitattributes", "README.md", "pytorch_model.bin", "modeling_gemma.py", "task.json"}
