"""Pairs of prompt and response, conversations, and files in numbers."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.core.common.errors import ParamsError
from stages.core.config.schema import Prepare
from stages.core.prepare.cleaning import Review, Tally, clean
from stages.core.prepare.parquet_file import write_reviews
from stages.core.prepare.sources import describe, own_inputs, summary
from tests.support.prepare_runs import DEFAULTS, OWN, WRITERS, prepare, read, write_jsonl

PAIRS = [
    ("Name a film.", "Heat.", 1),
    ("Name<br />another.", "Ran,<br />by Kurosawa", 1),
    ("Name a film.", "Heat.", 0),
    ("Name a film.", "Alien.", 0),
    ("", "An answer to nothing", 1),
    ("A question without an answer", None, 1),
    ("<br />", "An answer to a break", 1),
    ("a", "b", 1),
    ("NA", "null and void", 0),
]
KEPT = [
    Review("Heat.", 1, "mine:0", "Name a film."),
    Review("Ran,\nby Kurosawa", 1, "mine:1", "Name\nanother."),
    Review("Alien.", 0, "mine:3", "Name a film."),
    Review("null and void", 0, "mine:8", "NA"),
]
COLUMNS = {"prompt_column": "ask", "response_column": "say", "label_column": "kind", "min_characters": 3}


def write_pairs(path, rows=PAIRS):
    """Write pairs in the format that the suffix names."""
    columns = dict(zip(("ask", "say", "kind"), zip(*rows, strict=True), strict=True))
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([tuple(columns), *rows])
    elif path.suffix == ".jsonl":
        write_jsonl(path, [dict(zip(columns, row, strict=True)) for row in rows])
    else:
        pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)
    return path


@pytest.mark.parametrize("suffix", WRITERS)
def test_pairs_are_cleaned_and_counted_as_reviews_are_in_both_columns(tmp_path, suffix):
    path = write_pairs(tmp_path / f"mine{suffix}")
    tally = Tally()
    raw = read(path, "say", "kind", "ask")
    kept = list(clean(raw, "newline", 3, "drop", set(), tally))
    assert kept == [review._replace(id=review.id.replace("mine", f"mine{suffix}")) for review in KEPT]
    assert tally == Tally(read=9, empty=3, too_short=1, duplicates=1, changed=1)


def test_a_prompt_may_have_a_response_in_each_part_but_not_the_same_one(tmp_path):
    write_pairs(tmp_path / "mine.jsonl")
    write_pairs(tmp_path / "held.jsonl", [("Name a film.", "Alien.", 0), ("Name a film.", "Up.", 0)])
    parts, tally = prepare(tmp_path, train_file="mine.jsonl", validation_file="held.jsonl", **COLUMNS)
    assert [(review.prompt, review.text) for review in parts["validation"]] == [
        ("Name a film.", "Alien."),
        ("Name a film.", "Up."),
    ]
    assert [review.text for review in parts["train"]] == ["Heat.", "Ran,\nby Kurosawa", "null and void"]
    assert tally.duplicates == 2


@pytest.mark.parametrize("name", ["prompt_column", "response_column"])
def test_a_column_of_pairs_that_is_not_there_is_told_by_its_setting(tmp_path, name):
    write_pairs(tmp_path / "mine.csv")
    with pytest.raises(ParamsError, match=rf"prepare\.{name} must be a column of mine\.csv: ask, say, kind\. Received"):
        prepare(tmp_path, train_file="mine.csv", **COLUMNS | {name: "none"})


def test_a_text_file_has_no_pairs(tmp_path):
    (tmp_path / "mine.txt").write_text("a text\n")
    with pytest.raises(ParamsError, match=r"prepare\.prompt_column must be null with a text file"):
        prepare(tmp_path, train_file="mine.txt", **COLUMNS | {"label_column": None})


def test_half_a_character_in_a_prompt_is_told_too(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"ask": "\\ud83d", "say": "yes", "kind": 1}\n')
    with pytest.raises(
        ParamsError, match=r"whole Unicode characters\. Received: half of one in line 1 of .*, column ask"
    ):
        prepare(tmp_path, train_file="mine.jsonl", **COLUMNS)


def test_pairs_are_kept_apart_in_the_table(tmp_path):
    write_reviews(tmp_path / "pairs.parquet", KEPT)
    table = pq.read_table(tmp_path / "pairs.parquet")
    assert table.column_names == ["prompt", "response", "label", "id"]
    assert [(row["prompt"], row["response"], row["label"]) for row in table.to_pylist()] == [
        (review.prompt, review.text, review.label) for review in KEPT
    ]
    metrics = describe({"train": KEPT[:2], "validation": KEPT[2:]}, Tally(9, 3, 1, 1))
    assert metrics.characters_mean == round(sum(len(review.prompt + review.text) for review in KEPT) / 4, 1)


def exchanges(tmp_path, suffix, rows, **changes):
    """Read rows, and return (prompt, response) of each that is used, or all turns with a system's, and the counts."""
    path = tmp_path / f"mine{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    parts, tally = prepare(tmp_path, **OWN, train_file=path.name, **{"validation": 1, **changes})
    found = {
        int(review.id.rpartition(":")[2]): tuple(
            filter(None, (review.system, *review.earlier, review.prompt, review.text))
        )
        for part in parts.values()
        for review in part
    }
    return [found[row] for row in sorted(found)], tally


ALPACA = [
    {"instruction": "Translate.", "input": f"sentence {row}" if row else "", "output": f"Satz {row}"}
    for row in range(10)
]
ASKED = [("Translate." + (f"\n\nsentence {row}" if row else ""), f"Satz {row}") for row in range(10)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_alpaca_and_dolly_are_read_by_name_with_their_inputs(tmp_path, suffix):
    assert exchanges(tmp_path, suffix, ALPACA, format="alpaca") == (ASKED, Tally(read=10))
    names = {"instruction": "instruction", "input": "context", "output": "response"}
    dolly = [{names[key]: value for key, value in row.items()} for row in ALPACA]
    assert exchanges(tmp_path, suffix, dolly, format="dolly") == (ASKED, Tally(read=10))


def test_a_template_puts_columns_together(tmp_path):
    columns = {"prompt_column": "{instruction}\n\n{input}", "response_column": "{{{output}}}"}
    found, _ = exchanges(tmp_path, ".jsonl", ALPACA, **columns)
    assert found == [(prompt, f"{{{response}}}") for prompt, response in ASKED]
    named = [{"{x}": "in braces"}] * 2 + [{"{x}": "other"}]
    parts, _ = prepare(
        tmp_path, train_file=write_jsonl(tmp_path / "x.jsonl", named).name, text_column="{{x}}", validation=1
    )
    assert sorted(review.text for part in parts.values() for review in part) == ["in braces", "other"]
    for wrong in ("{instruction", "{}", "{instruction!r}", "{instruction:>9}"):
        with pytest.raises(ParamsError, match=r"prepare\.prompt_column must .*Received: prepare\.prompt_column=\{"):
            exchanges(tmp_path, ".jsonl", ALPACA, **columns | {"prompt_column": wrong})
    with pytest.raises(
        ParamsError, match=r"must name columns of mine\.jsonl: instruction, input, output\. Received: .*nix"
    ):
        exchanges(tmp_path, ".jsonl", ALPACA, **columns | {"prompt_column": "{nix}"})
    with pytest.raises(
        ParamsError, match=r"prepare\.format must name columns of .* Received: prepare\.format=dolly, which"
    ):
        exchanges(tmp_path, ".jsonl", ALPACA, format="dolly")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(
    "format, keys, roles",
    [("sharegpt", ("from", "value"), ("human", "gpt")), ("messages", ("role", "content"), ("user", "assistant"))],
)
def test_conversations_are_read_by_name_and_those_of_another_order_are_counted(tmp_path, suffix, format, keys, roles):
    asked, said = roles
    conversations = [
        [(asked, "How?"), (said, "So.")],
        [("system", "Be brief."), (asked, "Why?"), (said, "Because.")],
        [(asked, "One"), (said, "two"), (asked, "three"), (said, "four")],
        [("system", " "), (asked, "One"), (said, "two"), (asked, "three"), (said, "five")],
        [(asked, "One"), (said, "two"), (asked, "Nobody answers")],
        [(asked, "One"), (said, "two"), (said, "three"), (asked, "four")],
        [(asked, "One"), ("tool", "two")],
        [("system", "Nobody speaks")],
        [(asked, "One"), (said, ""), (asked, "three"), (said, "four")],
        [(asked, "Nobody answers")],
        [(said, "Nobody asked"), (asked, "me")],
        [(asked, "Empty?"), (said, "")],
        [],
    ]
    column = "conversations" if format == "sharegpt" else "messages"
    rows = [{column: [dict(zip(keys, turn, strict=True)) for turn in turns], "id": "a"} for turns in conversations]
    found, tally = exchanges(tmp_path, suffix, rows, format=format)
    assert found == [
        ("How?", "So."),
        ("Be brief.", "Why?", "Because."),
        ("One", "two", "three", "four"),
        ("One", "two", "three", "five"),
    ]
    assert tally == Tally(read=13, empty=3, other_conversations=6)


@pytest.mark.parametrize(
    "turns, kind", [("Hi", "a text or number"), ([3], "3"), ([{"role": "user", "content": [1]}], "a list")]
)
def test_what_is_no_conversation_is_told_with_its_line(tmp_path, turns, kind):
    with pytest.raises(ParamsError, match=rf"Received: ({kind}|a text or number without role) in line 2 of"):
        exchanges(tmp_path, ".jsonl", [{"messages": []}, {"messages": turns}], format="messages")


def test_what_is_said_of_conversations_counts_the_longer_ones(tmp_path):
    turns = [{"role": role, "content": "One"} for role in ("user", "assistant")]
    write_jsonl(
        tmp_path / "mine.jsonl", [{"messages": turns * count} for count in (1, 2, 3)] + [{"messages": turns[:1]}]
    )
    parts, tally = prepare(tmp_path, **OWN, train_file="mine.jsonl", validation=1, format="messages")
    said = summary(parts, tally)
    assert "1 conversations in which user and model do not take turns" in said
    assert "With more than one prompt and response: 2." in said


@pytest.mark.parametrize(
    ("suffix", "row"),
    [
        (".jsonl", {"message_tree_id": "a", "tree_state": "ready", "prompt": {"text": "How?", "replies": []}}),
        (
            ".parquet",
            {"message_tree_id": "a", "message_id": "a", "parent_id": None, "text": "How?", "role": "prompter"},
        ),
    ],
    ids=["trees", "flat"],
)
def test_openassistants_trees_are_refused_by_name_with_what_to_do(tmp_path, suffix, row):
    with pytest.raises(ParamsError, match=r"has trees of messages, as OpenAssistant .* prepare\.format: messages"):
        exchanges(tmp_path, suffix, [row] * 3, format="messages")


def test_files_in_a_list_or_a_pattern_are_read_one_after_the_other(tmp_path):
    for folder, name, label in (("a", "one.csv", 1), ("b", "one.csv", 0), ("b", "two.csv", "x")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text(f"text,label\n{folder} {name},{label}\n")
    (tmp_path / "c[1].csv").write_text("text,label\nin brackets,3\n")
    read_all = {"train_file": ["b/*.csv", "a/one.csv", "c[1].csv"], "label_column": "label", "validation": 1}
    parts, _ = prepare(tmp_path, **read_all)
    found = sorted((review.id, review.text, review.label) for part in parts.values() for review in part)
    assert found == [
        ("a/one.csv:0", "a one.csv", "1"),
        ("b/one.csv:0", "b one.csv", "0"),
        ("c[1].csv:0", "in brackets", "3"),
        ("two.csv:0", "b two.csv", "x"),
    ]
    write_reviews(tmp_path / "out.parquet", parts["train"])
    with pytest.raises(ParamsError, match=r"must find a file\. Received: prepare\.train_file=none/\*\.csv, which"):
        prepare(tmp_path, **read_all | {"train_file": "none/*.csv"})


def test_several_files_are_a_dependency_by_their_folder(tmp_path):
    def place(value):
        changes = {"train_file": value, "source": "files"}
        return own_inputs(Prepare.model_validate(DEFAULTS | changes), tmp_path)["train_file"]

    (tmp_path / "own" / "more").mkdir(parents=True)
    for name in ("own/a.csv", "own/more/b.csv", "c.csv"):
        (tmp_path / name).write_text("text\na\n")
    assert place("own/a.csv") == tmp_path / "own/a.csv"
    assert place("own") == place("own/*.csv") == place(["own/a.csv", "own/more/b.csv"]) == tmp_path / "own"
    with pytest.raises(ParamsError, match=r"prepare\.train_file must name several files in a folder of their own"):
        place(["own/a.csv", "c.csv"])


def test_the_folders_of_the_movie_review_dataset_are_read_with_their_labels(tmp_path):
    for name in ("pos", "neg"):
        (tmp_path / "aclImdb" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "aclImdb" / name / f"{number}_9.txt").write_text(f"{name} {number}\nof two lines")
    parts, _ = prepare(tmp_path, train_file="aclImdb", **OWN)
    found = sorted((review.text, review.label) for part in parts.values() for review in part)
    assert found == sorted(
        (f"{name} {number}\nof two lines", int(name == "pos")) for name in ("pos", "neg") for number in range(3)
    )
    with pytest.raises(ParamsError, match=r"a folder that has \.txt files in folders pos and neg\. Received"):
        prepare(tmp_path, train_file=".")
