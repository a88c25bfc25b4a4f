"""A preset of a stranger's reads no file but its own, and runs nothing."""

from __future__ import annotations

import json
import shutil

import h5py
import numpy as np
import pytest

from stages.core.errors import ParamsError, StageError
from stages.core.keras_folder import check_keras_folder
from stages.core.safetensors_weights import shard_files
from tests.models import load_tiny
from tests.preset_folder import make_preset

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
    with pytest.raises(ParamsError, match=r"must name files beside it\. Received: " + name.replace(".", r"\.")):
        check_keras_folder(folder)


@pytest.mark.parametrize("name", ["../model-00001-of-00001.safetensors", "/etc/hosts"])
def test_an_index_of_safetensors_that_names_files_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(StageError, match="must name files beside it"):
        shard_files(tmp_path)
