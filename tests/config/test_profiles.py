"""The profiles: written in place, the same whatever was there, valid, and fitting the devices they name."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from stages import profile
from stages.core.common.errors import ParamsError
from stages.core.config.edit import rewrite
from stages.core.config.profiles import PROFILES, apply
from stages.core.config.reader import check_params, parse, plain
from stages.core.fetch import catalog
from stages.core.plan import compilation, gpus, search, shapes, targets, topology
from stages.core.sharding.layout import check_replication
from stages.core.sharding.mesh import MeshShape
from stages.core.sharding.named_layouts import make_layout
from tests.support.plans import has_libtpu
from tests.support.repository import ROOT

DEFAULT = (ROOT / "params.yaml").read_text()
EVERY = pytest.mark.parametrize("name", PROFILES)


def applied(name: str, text: str = DEFAULT, *overrides: str) -> str:
    return apply(name, text, "params.yaml", overrides)[0]


def value(text: str, key: str):
    section, name = key.split(".")
    return plain(parse(text, "params.yaml"))[section][name]


def with_values(**values: str) -> str:
    """The default settings with others, `section__key="YAML"`."""
    return rewrite(DEFAULT, {key.replace("__", "."): written for key, written in values.items()}, "params.yaml")[0]


# --- What is written. ---


def test_quickstart_is_the_committed_file():
    text, changes = apply("quickstart", DEFAULT, "params.yaml")
    assert (text, changes) == (DEFAULT, [])
    spoken = {key for each in PROFILES.values() for key in each.values}
    assert spoken == set(PROFILES["quickstart"].values), "quickstart has a value for all that profiles speak of"


def test_a_profile_gives_the_same_file_whichever_was_applied_before():
    expected = {name: applied(name) for name in PROFILES}
    for order in (list(PROFILES), list(reversed(PROFILES))):
        text = DEFAULT
        for name in [*order, order[0]]:
            text = applied(name, text)
            assert text == expected[name], name


@EVERY
def test_applying_one_twice_changes_nothing_more(name: str):
    text = applied(name)
    assert apply(name, text, "params.yaml") == (text, [])


@EVERY
def test_a_profile_is_valid_and_changes_what_it_says_and_nothing_else(name: str):
    text, changes = apply(name, DEFAULT, "params.yaml")
    check_params(text, "params.yaml")
    before, after = (plain(parse(each, "params.yaml")) for each in (DEFAULT, text))
    differing = {
        f"{section}.{key}"
        for section in before
        for key in before[section]
        if before[section][key] != after[section][key]
    }
    assert (
        differing
        == {change.key for change in changes}
        == (set(PROFILES[name].values) if name != "quickstart" else set())
    )
    comments = [[line for line in each.splitlines() if line.strip().startswith("#")] for each in (DEFAULT, text)]
    assert comments[0] == comments[1]


def test_what_no_profile_speaks_of_stays():
    mine = with_values(
        generate__prompts="[Mine]", finetune__seed="7", prepare__validation="12", finetune__sample_prompt="Mine too"
    )
    for name in PROFILES:
        found = plain(parse(applied(name, mine), "params.yaml"))
        assert found["generate"]["prompts"] == ["Mine"]
        assert found["finetune"]["sample_prompt"] == "Mine too"
        assert (found["finetune"]["seed"], found["prepare"]["validation"]) == (7, 12)


def test_a_setting_of_ones_own_that_profiles_speak_of_goes_back_to_what_the_profile_says():
    mine = with_values(finetune__rank="16", finetune__alpha="8.0", layout__max_replicated_fraction="0.5")
    text = applied("gpu-single", mine)
    assert (value(text, "finetune.rank"), value(text, "finetune.alpha")) == (8, None)
    assert value(text, "layout.max_replicated_fraction") == 0.5


ABOUT = {"quickstart", "tutorial-tpu-v3-8", "instruct"}


@EVERY
def test_a_model_and_data_of_ones_own_stay_unless_the_profile_is_about_them(name: str):
    mine = with_values(
        fetch__source="path", fetch__preset="mine", fetch__path="/models/mine",
        prepare__source="files", prepare__train_file="my.csv", prepare__validation_file="held.csv",
        prepare__prompt_column="ask", prepare__response_column="say", generate__chat_template="true",
    )  # fmt: skip
    text = applied(name, mine)
    check_params(text, "params.yaml")
    assert (value(text, "fetch.path") == "/models/mine") == (name not in ABOUT)
    assert value(text, "prepare.train_file") == (None if name in ABOUT - {"instruct"} else "my.csv")
    assert value(text, "prepare.validation_file") == (None if name in ABOUT - {"instruct"} else "held.csv")
    assert (value(text, "prepare.prompt_column") == "ask") == value(text, "generate.chat_template")
    assert value(text, "generate.chat_template") == (name not in ABOUT - {"instruct"})


def test_a_folder_with_the_dataset_stays_where_the_dataset_does():
    mine = with_values(prepare__source="imdb_reviews", prepare__data_dir="/data/tfds")
    assert value(applied("tutorial-tpu-v3-8", mine), "prepare.data_dir") == "/data/tfds"
    assert value(applied("gpu-single", mine), "prepare.data_dir") is None


def test_files_of_plain_text_get_the_columns_of_pairs_under_instruct():
    text = applied("instruct", with_values(prepare__source="files", prepare__train_file="my.csv"))
    assert (value(text, "prepare.train_file"), value(text, "prepare.prompt_column")) == ("my.csv", "prompt")


# --- Files as people write them. ---


OWN_STYLE = """\
# My settings
a: {one: 1, two: [1, 2]} # flow
b:
  one: 5.0e-5   # why
  two:
  three:
  # about four, five and six
  four:
  - {x: 1}
  - {x: 2}
  five: text
  six:
  - p
  - q

c: {four: []}
"""


@pytest.mark.parametrize(
    "key, written, old, new",
    [
        ("a.one", "2", "one: 1,", "one: 2,"),
        ("b.one", "1.0e-3", "one: 5.0e-5   # why", "one: 1.0e-3   # why"),
        ("b.two", "5", "  two:\n", "  two: 5\n"),
        ("b.three", "true", "three:\n", "three: true\n"),
        ("b.four", "[]", "  four:\n  - {x: 1}\n  - {x: 2}\n", "  four: []\n"),
        ("b.four", "[{x: 3}]", "  - {x: 1}\n  - {x: 2}\n", "  - x: 3\n"),
        ("b.five", "[{x: 3}]", "five: text", "five:\n  - x: 3"),
        ("b.five", "", "five: text", "five:"),
        ("b.five", "'1'", "five: text", "five: '1'"),
        ("c.four", "[3, 4]", "{four: []}", "{four: [3, 4]}"),
    ],
)
def test_a_value_is_replaced_where_it_stands_and_nothing_else(key, written, old, new):
    assert OWN_STYLE.count(old) == 1
    for ending in ("\n", "\r\n"):
        changed, (change,) = rewrite(OWN_STYLE.replace("\n", ending), {key: written}, "mine.yaml")
        assert changed.replace("\r\n", "\n") == OWN_STYLE.replace(old, new)
        assert changed.count("\r\n") == (changed.count("\n") if ending == "\r\n" else 0)
        assert change.key == key
        assert "\n" not in change.old + change.new


def test_several_values_are_replaced_at_once_and_equal_ones_stay_as_they_are_written():
    text, changes = rewrite(
        OWN_STYLE, {"b.three": "null", "b.one": "0.00005", "a.one": "3", "b.five": "x"}, "mine.yaml"
    )
    assert text == OWN_STYLE.replace("one: 1,", "one: 3,").replace("text", "x")
    assert [(change.key, change.old, change.new) for change in changes] == [
        ("a.one", "1", "3"),
        ("b.five", "text", "x"),
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("b: {one: 1}\n", r"mine\.yaml: b\.two is missing; every setting must be written out"),
        ("a: &x {two: 1}\nb: *x\n", r"cannot be changed\. Received: b\.two"),
        ("b:\n  two:\n  - 1\n  # why\n  c: 1\n", r"between a list and the next key .* Received: # why\. Move it above"),
        ("b: [\n", r"is not valid YAML"),
        ("- b\n", r"must hold sections"),
    ],
)
def test_a_file_that_cannot_be_changed_is_told(text, message):
    with pytest.raises(ParamsError, match=message):
        rewrite(text, {"b.two": "3"}, "mine.yaml")


# --- The command. ---


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_text(DEFAULT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(profile.main, arguments)


def test_the_list_has_a_line_each_and_marks_the_one_in_use(folder: Path):
    for name in ("quickstart", "gpu-single"):
        assert run(name).exit_code == 0
        lines = run().stdout.splitlines()
        assert [line.split()[0] for line in lines] == list(PROFILES)
        assert [line.split()[0] for line in lines if " in use " in line] == [name]
        assert all(len(line) <= 130 for line in lines)


def test_what_changed_is_printed_and_the_file_is_written(folder: Path):
    done = run("gpu-single", "--set", "finetune.rank=16")
    assert done.exit_code == 0
    assert (folder / "params.yaml").read_text() == applied("gpu-single", DEFAULT, "finetune.rank=16")
    assert "mesh.shape: [2, 4] → [1, 1]" in done.stdout.splitlines()
    assert "finetune.rank: 8 → 16" in done.stdout.splitlines()
    assert done.stderr == "9 settings changed for gpu-single.\n"
    assert (
        run("gpu-single", "--set", "finetune.rank=16").stderr == "params.yaml already has the settings of gpu-single.\n"
    )
    assert sorted(path.name for path in folder.iterdir()) == ["params.yaml"], "no temporary file is left"


def test_a_dry_run_shows_the_changes_and_writes_nothing(folder: Path):
    done = run("instruct", "--dry-run")
    assert "fetch.preset: gemma3_270m → gemma3_instruct_270m" in done.stdout
    assert "settings would change for instruct.\nNot there yet: pairs.jsonl (prepare.train_file)" in done.stderr
    assert (folder / "params.yaml").read_text() == DEFAULT


MISTAKES = [
    (["gpu-singel"], "Did you mean gpu-single? Received: gpu-singel"),
    (["zzz"], "NAME must be one of quickstart, "),
    (["gpu-single", "--set", "finetune.rnk=8"], "finetune.rnk is not a key of the settings. Did you mean rank?"),
    (
        ["gpu-single", "--set", "finetune.rank=eight"],
        "finetune.rank must be a valid integer. Received: finetune.rank='eight'",
    ),
    (["gpu-single", "--set", "fetch.path=/x"], "path must be given with source: path"),
]


@pytest.mark.parametrize("arguments, message", MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_ends_with_exit_code_2_and_leaves_the_file_alone(folder: Path, arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("Invalid setting: ") and message in done.stderr
    assert (folder / "params.yaml").read_text() == DEFAULT


def test_settings_that_are_wrong_already_are_told_and_not_written(folder: Path):
    (folder / "params.yaml").write_text(DEFAULT.replace("seed: 0", "seed: zero"))
    before = (folder / "params.yaml").read_text()
    done = run("gpu-single")
    assert done.exit_code == 2 and "seed must be a valid integer" in done.stderr
    assert (folder / "params.yaml").read_text() == before


def test_the_command_imports_nothing_heavy():
    program = (
        "import sys; from stages.profile import main\n"
        "main(['gpu-single', '--dry-run'], standalone_mode=False)\n"
        "sys.exit(', '.join({'tensorflow', 'keras', 'jax', 'numpy', 'pandas'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- What the profiles ask for exists and fits. ---


def params_of(name: str):
    return check_params(applied(name), "params.yaml")


@EVERY
def test_the_layout_fits_the_preset_and_the_mesh(devices, name: str):
    params = params_of(name)
    architecture = catalog.architecture(params.fetch.preset)
    mesh = MeshShape(tuple(params.mesh.shape))
    layout = make_layout(params.layout, architecture, mesh)
    placements = shapes.resolve_shapes(architecture, mesh, layout, params.load.dtype, params.finetune.lora)
    base = [each for each in placements if each.weight.kind == "weight"]
    check_replication(base, mesh, params.layout.max_replicated_fraction)
    names = [each.weight.path for each in placements if each.weight.kind == "lora"]
    assert bool(names) == (params.finetune.rank > 0)


def test_the_presets_are_keras_hubs(devices):
    import keras_hub

    registry = {**keras_hub.models.GemmaBackbone.presets, **keras_hub.models.Gemma3Backbone.presets}
    assert {params_of(name).fetch.preset for name in PROFILES} <= set(registry)


# The others train the quickstart's small model on batches that are no larger than the planned ones.
@has_libtpu
@pytest.mark.parametrize("name", [name for name in PROFILES if name not in ("full-parameter", "instruct")])
def test_the_step_fits_where_the_plan_of_the_profile_puts_it(devices, name: str, monkeypatch):
    """Over a program of two blocks, in seconds; a 7B compiled whole takes a minute. Its temporaries times the model's
    depth are more than the whole step's; where that is too much to tell, a program of one block gives the slope, as
    one of four does in `plan.search`."""
    params = params_of(name)
    own = (params.mesh.shape, params.load.dtype, params.tokenize.length, params.finetune, params.layout.name)
    if any(target.topology.partition(":")[0] in gpus.GPUS for target in params.plan.targets):
        pytest.importorskip("jax_plugins.xla_cuda12", reason="needs XLA's compiler for GPUs, requirements-gpu-plan.txt")
    for target in params.plan.targets:
        _, request = targets.compile_request_of(params, target)
        step, where = request.step, topology.describe(target.topology)
        if (list(step.mesh.shape), step.dtype, step.length, step.settings, step.layout.name) == own:
            break
    else:
        pytest.fail("no target is the run itself")
    small = compilation.compile_step(dataclasses.replace(request, blocks=2))
    assert small.fits, small
    held = search.argument_bytes(request)
    most = held + (small.temporary_bytes + small.code_bytes) * step.architecture.config["num_layers"] // 2
    if where.memory_bytes is not None and most > where.memory_bytes:
        monkeypatch.setattr(search, "FEW", 1)
        monkeypatch.setattr(search, "MORE", 2)
        assert search.estimate_step(request, where, held).fits
