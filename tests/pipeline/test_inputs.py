"""What a stage reads from outside the repository is a dependency that DVC sees: edits rerun it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pandas
import pytest

from stages.core.common.inputs import declare
from stages.core.common.paths import Paths
from stages.core.config.reader import read_params
from tests.support.copies import change, copy_repository, dvc, ran
from tests.support.repository import ROOT, STAGES

pytestmark = pytest.mark.xdist_group("pipeline")


def test_the_place_of_an_input_is_a_link_to_the_users_file_or_to_none(tmp_path: Path):
    paths = Paths(tmp_path / "repository", tmp_path / "repository")
    place = tmp_path / "repository/data/inputs/prepare/train_file"
    none = (ROOT / "data/inputs/none").read_text()
    declare(paths, "prepare", "train_file", None)
    assert (str(place.readlink()), place.read_text()) == ("../none", none)
    for name, link in (("repository/own/mine.csv", "../../../own/mine.csv"), ("mine.csv", str(tmp_path / "mine.csv"))):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
        for _ in range(2):
            declare(paths, "prepare", "train_file", file)
            assert (str(place.readlink()), place.read_text()) == (link, name)
    declare(Paths(paths.root, tmp_path / "trial"), "prepare", "train_file", tmp_path)
    assert place.read_text() == "mine.csv", "a trial leaves the pipeline alone"
    (tmp_path / "mine.csv").unlink()
    declare(paths, "prepare", "train_file", None)
    assert (str(place.readlink()), place.read_text()) == ("../none", none)


def test_every_place_of_an_input_is_a_link_in_git():
    listed = ["git", "ls-files", "--stage", "data/inputs"]
    lines = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    modes = {line.split("\t")[1]: line.split()[0] for line in lines}
    assert modes.pop("data/inputs/none") == "100644"
    assert set(modes.values()) == {"120000"}
    assert set(modes) == {
        path for stage in STAGES.values() for path in stage["deps"] if path.startswith("data/inputs/")
    }


def reviews(start: int) -> list[str]:
    return [f"Film {number} is worth a long evening." for number in range(start, start + 8)]


def rows(start: int) -> str:
    return "\n".join(["text", *reviews(start)]) + "\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return copy_repository(tmp_path / "repository")


def texts(repository: Path, part: str) -> list[str]:
    return list(pandas.read_parquet(repository / f"data/imdb/{part}.parquet")["text"])


def prepare(repository: Path) -> set[str]:
    return ran(dvc(repository, "repro", "prepare"))


def test_an_edit_of_the_users_own_files_reruns_prepare_and_no_older_text_comes_back(repository: Path, tmp_path: Path):
    train, held_out = tmp_path / "train.csv", repository / "held_out.csv"
    train.write_text(rows(0))
    held_out.write_text(rows(40))
    own = {"source": "files", "train_file": str(train), "validation_file": "held_out.csv", "min_characters": 1}
    change(repository, "prepare", **own, shuffle=False)
    assert prepare(repository) == {"prepare"}
    assert prepare(repository) == set()
    assert "prepare" not in dvc(repository, "status", "prepare").stdout

    for part, file, start in (("train", train, 8), ("validation", held_out, 60)):
        file.write_text(rows(start))
        assert (
            f"data/inputs/prepare/{part if part == 'validation' else 'train'}_file" in dvc(repository, "status").stdout
        )
        before = texts(repository, part)
        assert prepare(repository) == {"prepare"}
        assert texts(repository, part) != before

    # Another setting and back, with an edit in between: the run cache has the old settings with old texts only.
    change(repository, "prepare", take=5)
    assert prepare(repository) == {"prepare"}
    train.write_text(rows(16))
    change(repository, "prepare", take=None)
    assert prepare(repository) == {"prepare"}
    assert texts(repository, "train") == reviews(16)


def test_an_edit_of_a_preset_folder_or_of_a_dataset_is_seen(repository: Path, tmp_path: Path, one_block: Path):
    folder = tmp_path / "preset"
    shutil.copytree(one_block, folder)
    change(repository, "fetch", source="path", preset="tiny", path=str(folder))
    assert ran(dvc(repository, "repro", "fetch")) == {"fetch"}
    assert ran(dvc(repository, "repro", "fetch")) == set()
    with (folder / "model.weights.h5").open("ab") as stream:
        stream.write(b"x")
    assert "data/inputs/fetch/path" in dvc(repository, "status", "fetch").stdout
    manifest = (repository / "models/preset/manifest.json").read_bytes()
    assert ran(dvc(repository, "repro", "fetch")) == {"fetch"}
    assert (repository / "models/preset/manifest.json").read_bytes() != manifest


# --- Experiments with data of the user's own. ---


@pytest.fixture
def on_own_data(repository: Path) -> Path:
    """A repository whose `own/mine.csv`, which git does not know, was prepared; nothing of it is committed."""
    (repository / "own").mkdir()
    (repository / "own/mine.csv").write_text(rows(0))
    own = {"source": "files", "train_file": "own/mine.csv", "min_characters": 1, "validation": 2}
    change(repository, "prepare", **own)
    assert prepare(repository) == {"prepare"}
    return repository


def test_an_experiment_leaves_the_users_own_files_and_settings_as_they_are(on_own_data: Path):
    assert ran(dvc(on_own_data, "exp", "run", "prepare", "-S", "prepare.seed=1")) == {"prepare"}
    assert (on_own_data / "own/mine.csv").read_text() == rows(0)
    settings = read_params(on_own_data / "params.yaml").prepare
    assert (settings.train_file, settings.seed) == ("own/mine.csv", 1)


def test_an_experiment_in_a_copy_reads_the_folder_that_is_named_for_it(on_own_data: Path):
    assert ran(dvc(on_own_data, "exp", "run", "--temp", "-C", "own", "prepare", "-S", "prepare.seed=1")) == {"prepare"}
    assert (on_own_data / "own/mine.csv").read_text() == rows(0)


def test_an_experiment_in_a_copy_reads_a_file_by_its_absolute_path(repository: Path, tmp_path: Path):
    (tmp_path / "mine.csv").write_text(rows(0))
    change(repository, "prepare", source="files", train_file=str(tmp_path / "mine.csv"), min_characters=1, validation=2)
    assert ran(dvc(repository, "exp", "run", "--temp", "prepare", "-S", "prepare.seed=1")) == {"prepare"}
