"""A preset of a stranger's reads no file but its own, and runs nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from keras.src.saving.saving_lib import H5IOStore

from stages.core.common.errors import ParamsError, StageError
from stages.core.fetch.local import check_keras_folder, fetch_local
from stages.core.presets.keras_h5 import _refuse_moved
from stages.core.presets.safetensors import weight_files
from tests.support.exported_gguf import written
from tests.support.fake_preset import make_preset
from tests.support.gguf_file import write_gguf
from tests.support.hf_folder import hugging_face_files
from tests.support.repository import ROOT
from tests.support.tiny_models import load_tiny
from tests.support.tiny_presets import EDGE, EXPERTS, tiny_backbone, write_tiny_preset
from tests.support.tuned_models import tuned

NORM = "layers/final_normalization/vars"


@pytest.mark.parametrize("trick", ["external link", "link of a folder", "external storage", "virtual dataset"])
def test_weights_that_hdf5_would_read_from_another_file_are_refused(presets, tmp_path, trick):
    folder = tmp_path / "preset"
    shutil.copytree(presets["gemma"], folder)
    secret = tmp_path / "secret"
    with h5py.File(folder / "model.weights.h5", "r+") as file:
        name = next(name for name in (f"{NORM}/0", "layers/rms_normalization/vars/0") if name in file)
        values = np.asarray(file[name])
        parent = name.rpartition("/")[0]
        with h5py.File(secret, "w") as other:
            other[name] = values
        if trick == "link of a folder":
            del file[parent]
            file[parent] = h5py.ExternalLink(str(secret), parent)
        else:
            del file[name]
        if trick == "external link":
            file[name] = h5py.ExternalLink(str(secret), name)
        elif trick == "external storage":
            secret.write_bytes(values.tobytes())
            file.create_dataset(name, values.shape, values.dtype, external=[(str(secret), 0, values.nbytes)])
        elif trick == "virtual dataset":
            layout = h5py.VirtualLayout(values.shape, values.dtype)
            layout[:] = h5py.VirtualSource(str(secret), name, values.shape)
            file.create_virtual_dataset(name, layout)
    with pytest.raises(StageError, match=r"model\.weights\.h5 must hold its own values\. Received: .*another file"):
        load_tiny(folder, (1, 1))


@pytest.mark.parametrize("name", ["../outside.weights.h5", "/etc/hosts", "folder/inside.weights.h5"])
def test_an_index_of_keras_that_names_files_elsewhere_is_refused(tmp_path, name):
    folder = make_preset(tmp_path / "preset", [])
    (folder / "model.weights.json").write_text(json.dumps({"weight_map": {"/layers/a/vars": [name]}}))
    with pytest.raises(ParamsError, match=r"must name files next to it\. Received: " + name.replace(".", r"\.")):
        check_keras_folder(folder)


@pytest.mark.parametrize("name", ["../model-00001-of-00001.safetensors", "/etc/hosts"])
def test_an_index_of_safetensors_that_names_files_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(StageError, match="must name files next to it"):
        weight_files(tmp_path)


@pytest.mark.parametrize("kind", ["config", "keras config", "safetensors", "hdf5", "gguf", "gguf of Gemma 4"])
def test_of_200_mutations_none_is_read_wrongly_ends_in_a_traceback_or_fills_the_memory(kind, devices, tmp_path):
    if kind == "gguf":
        write_gguf(tmp_path / "tiny.gguf", tiny_backbone("gemma3"), "F32")
    elif kind == "gguf of Gemma 4":
        preset = write_tiny_preset(tmp_path / "preset", "gemma4", **EDGE["E2B"], **EXPERTS)
        written(tuned(preset, tmp_path)[1], tmp_path)
    elif kind in ("keras config", "hdf5"):
        make_preset(tmp_path)
    else:
        for name, content in hugging_face_files().items():
            (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-m", "tests.support.fuzz_presets", kind.partition(" of")[0], str(tmp_path), "200", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["tried"], found["tracebacks"], found["wrong"]) == (200, [], [])
    assert found["refused"] > 20


def test_a_weight_whose_place_in_the_file_was_changed_is_refused(tmp_path):
    make_preset(tmp_path)
    path, name = tmp_path / "model.weights.h5", "layers/gemma_decoder_block/attention/value_dense/vars/0"
    original = path.read_bytes()
    with h5py.File(path) as file:
        start, count = file[name].id.get_offset(), file[name].id.get_storage_size()
    place = original.index(start.to_bytes(8, "little") + count.to_bytes(8, "little"))
    # By 32 bytes to the left there is free room in the file; elsewhere what HDF5 needs to find its datasets.
    for moved in (start - 32, start - 8, start + 8, start + 16, start + count - 1, start - 256, 0):
        path.write_bytes(original[:place] + moved.to_bytes(8, "little") + original[place + 8 :])
        with pytest.raises(ParamsError, match="The preset cannot be used"):
            fetch_local("mine", str(tmp_path), tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_file_that_keras_writes_is_taken_for_a_changed_one(tmp_path, devices, dtype):
    store, rng = H5IOStore(tmp_path / "model.weights.h5", mode="w"), np.random.default_rng(0)
    for number in range(30):
        for name, shape in (("attention/query_dense", (4, 64, 16)), ("pre_norm", (63,)), ("ffw_linear", (64, 127))):
            store.make(f"layers/gemma_decoder_block_{number}/{name}/vars")["0"] = rng.normal(size=shape).astype(dtype)
    store.close()
    datasets = {}
    with h5py.File(tmp_path / "model.weights.h5") as file:
        file.visititems(lambda name, found: datasets.update({name: found} if isinstance(found, h5py.Dataset) else {}))
        assert len(datasets) == 90
        _refuse_moved(datasets)


def keras_preset(folder: Path, class_name: str = "GemmaBackbone", **changes) -> Path:
    """The smallest preset with other arguments."""
    make_preset(folder)
    config = json.loads((folder / "config.json").read_text())
    config["class_name"] = class_name
    config["config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


EMBEDDING = {"is_embedding_model": True, "pooling_intermediate_dim": 8, "embedding_dim": 4}
POLICY = {"module": "keras", "class_name": "QuantizedDTypePolicy", "config": {"mode": "int8", "source_name": "float32"}}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"class_name": "Gemma3Backbone", "image_size": None, **EMBEDDING}, "an embedding model predicts no tokens"),
        ({"class_name": "Gemma3Backbone", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"dropout": 0.1}, "dropout 0"),
        ({"dtype": POLICY}, "QuantizedDTypePolicy"),
        ({"dtype": "int8_from_float32"}, "int8_from_float32"),
        ({"num_layers": 10**9}, "num_layers=1000000000"),
        ({"num_query_heads": 0}, "num_query_heads=0"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"layer_norm_epsilon": 0.01}, "layer_norm_epsilon=0.01"),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else "",
)
def test_a_keras_hub_preset_that_the_forward_pass_does_not_fit_is_refused_at_fetch(tmp_path, changes, said):
    with pytest.raises(ParamsError, match=said):
        fetch_local("mine", str(keras_preset(tmp_path, **changes)), tmp_path)


@pytest.mark.parametrize("dtype, said", [("i1", "plain floats, not quantized"), ("u1", "not q"), ("V2", "not q")])
def test_weights_of_codes_are_refused_at_fetch(tmp_path, dtype, said):
    make_preset(tmp_path)
    name = "layers/gemma_decoder_block/ffw_linear/vars/0"
    with h5py.File(tmp_path / "model.weights.h5", "a") as file:
        shape = file[name].shape
        del file[name]
        file.create_dataset(name, data=np.zeros(shape, dtype))
    with pytest.raises(ParamsError, match=said):
        fetch_local("mine", str(tmp_path), tmp_path)


def test_a_weight_that_unfolds_from_few_bytes_and_one_that_nobody_wants_are_refused(tmp_path):
    make_preset(tmp_path)
    name = "layers/gemma_decoder_block/ffw_linear/vars/0"
    with h5py.File(tmp_path / "model.weights.h5", "a") as file:
        values = np.asarray(file[name])
        file["layers/dense/vars/0"] = values
    with pytest.raises(ParamsError, match=r"Received: layers/dense/vars/0"):
        fetch_local("mine", str(tmp_path), tmp_path)
    with h5py.File(tmp_path / "model.weights.h5", "a") as file:
        del file["layers/dense"], file[name]
        file.create_dataset(name, data=values, chunks=True, compression="gzip")
    with pytest.raises(ParamsError, match="in one piece"):
        fetch_local("mine", str(tmp_path), tmp_path)
