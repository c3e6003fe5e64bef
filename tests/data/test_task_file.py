"""Tasks from tables: rows written by csv, json and pyarrow, and what cannot be used."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import sys
import types
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.data import Example, Task, TaskConfig, load_task
from sparsetrain.data.sources.base import content_id
from sparsetrain.data.tasks.labelled_rows import Rows, task_of
from sparsetrain.errors import UserError

ALL: dict[str, Any] = {"name": "file", "n_train": None, "n_validation": None, "n_test": None}
LABELS = ("no", "none", 'so, "so"')


def awkward(count: int = 90) -> list[dict[str, str]]:
    """Return rows with quotes and line ends in their cells, ids that occur twice, and labels that begin others."""
    draw = random.Random(0)
    return [
        {"id": f"d{n % 40}", "text": f'text {n}, "said"\r\nand\nmore\ttabs', "label": draw.choice(LABELS), "x": ""}
        for n in range(count)
    ]


def write(path: Path, rows: Sequence[dict[str, Any]], **how: Any) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        with path.open("w", newline="", encoding=how.pop("encoding", "utf-8")) as stream:
            writer = csv.DictWriter(stream, columns, **how)
            writer.writeheader()
            writer.writerows(rows)
    return str(path)


def load(path: str | Path, **changes: Any) -> Task:
    return load_task(TaskConfig(**{**ALL, "path": str(path), **changes}))


def plain(*truths: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {n}", "label": truth, **more} for n, truth in enumerate(truths)]


def every(task: Task) -> list[Example]:
    return [*task.train, *task.validation, *task.test]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.csv", {"encoding": "utf-8-sig", "lineterminator": "\r\n"}),
        ("a.csv", {"lineterminator": "\n", "quoting": csv.QUOTE_ALL}),
        ("a.tsv", {"delimiter": "\t"}),
        ("a.jsonl", {}),
        ("a.parquet", {}),
    ],
)
def test_the_rows_of_every_format_are_those_that_were_written(tmp_path: Path, name: str, how: dict[str, Any]) -> None:
    rows = awkward()
    task = load(write(tmp_path / name, rows, **how))
    assert task.labels == ("no", "none", 'so, "so"')
    assert task.answers == (" no", " none", ' so, "so"')
    assert Counter((e.id, e.source, task.labels[e.label]) for e in every(task)) == Counter(
        (row["id"], row["text"] + "\nlabel:", row["label"]) for row in rows
    )
    assert (len(task.validation), len(task.test)) == (9, 18)
    places = [row["text"] for row in rows]
    assert sorted(task.test, key=lambda e: places.index(e.text)) == task.test  # in the order of the file
    assert task.fingerprint() == load(write(tmp_path / "same.jsonl", rows)).fingerprint()


def test_neither_the_seed_nor_the_counts_move_a_row_to_another_split(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", awkward())
    whole, some, more = load(path), load(path, seed=3, n_train=10, n_test=4), load(path, seed=3, n_train=20, n_test=5)
    assert {e.source for e in some.train} < {e.source for e in more.train} < {e.source for e in whole.train}
    assert {e.source for e in some.test} < {e.source for e in more.test} < {e.source for e in whole.test}
    assert [e.source for e in some.train] != [e.source for e in load(path, seed=4, n_train=10).train]
    assert some.labels == whole.labels


@given(groups=st.lists(st.integers(0, 12), min_size=30, max_size=60), labels=st.integers(2, 4))
def test_a_group_is_in_one_split_and_every_label_is_trained(groups: list[int], labels: int) -> None:
    rows = [{"text": f"t{n}", "label": f"{n % labels}", "group": group} for n, group in enumerate(groups)]
    table = Rows("rows", list(rows[0]), [(n, row, None) for n, row in enumerate(rows)], "row {}".format)
    try:
        task = task_of(TaskConfig(**ALL), table)
    except UserError as error:
        assert "to train on; give more, or mark the splits" in str(error)  # noqa: PT017
        return
    splits = [{e.document for e in split} for split in (task.train, task.validation, task.test)]
    assert sum(map(len, splits)) == len(set(groups)) == len(set.union(*splits))
    assert {e.label for e in task.train} == set(range(labels))
    assert len(every(task)) == len(rows)


def test_copies_of_a_text_share_a_split(tmp_path: Path) -> None:
    rows = [{"text": f"text {n % 30}", "label": "ab"[n % 2]} for n in range(90)]
    task = load(write(tmp_path / "a.csv", rows))
    texts = [{e.source for e in split} for split in (task.train, task.validation, task.test)]
    assert sum(map(len, texts)) == 30
    assert task.repeated == 0


@pytest.mark.parametrize("names", [("train", "validation", "test"), ("Training", "dev", "TEST")])
def test_marked_rows_keep_their_splits(tmp_path: Path, names: tuple[str, str, str]) -> None:
    rows = plain(*"abab" * 6, split=names[0]) + plain(*"ba", split=names[1]) + plain(*"abb", split=names[2])
    task = load(write(tmp_path / "a.csv", rows))
    assert [len(split) for split in (task.train, task.validation, task.test)] == [24, 2, 3]
    assert task.repeated == 3  # "text 0" to "text 2" are in training too
    assert "3 to test are like one to train on" in task.describe()
    rows = [{**row, "split": "train"} if row["split"] == names[1] else row for row in rows]
    task = load(write(tmp_path / "b.csv", rows), validation_fraction=0.25)
    assert len(task.train) + len(task.validation) == 26
    assert 6 <= len(task.validation) <= 8
    assert not {e.source for e in task.train} & {e.source for e in task.validation}


def test_columns_template_labels_and_answers_are_set(tmp_path: Path) -> None:
    rows = [{"head": f"h{n}", "body": f"b{n}", "mood": n % 2, "where": "train"} for n in range(20)]
    rows += [{"head": "h", "body": "b{}", "mood": 1, "where": "test"}]
    names = {"label_field": "mood", "split_field": "where", "id_field": "head"}
    path = write(tmp_path / "a.jsonl", rows)
    task = load(path, **names, template="{head}: {body}\\nmood:", labels=["1", "0"], answers={"1": "good"})
    assert (task.labels, task.answers) == (("1", "0"), (" good", " 0"))
    assert task.test == [Example("h", "h: b{}\nmood:", 0, "h", text="h\nb{}")]
    assert task.form.columns == ("head", "body")
    assert load(path, **names, text_field="body").test[0].source == "b{}\nlabel:"


def test_several_labels_are_a_list_or_stand_in_a_cell(tmp_path: Path) -> None:
    sets = [[], ["x"], ["y", "x"], ["z"], ["x", "y", "z"], ["y"]] * 6
    listed = load(write(tmp_path / "a.jsonl", plain(*sets)))
    task = load(write(tmp_path / "a.csv", plain(*(" ; ".join(held) for held in sets))), label_separator=";")
    assert (task.kind, listed.kind) == ("several_labels", "several_labels")
    assert (task.labels, task.answers, task.template) == (("x", "y", "z"), (" no", " yes"), "{text}\n{label}:")
    assert every(task) == every(listed)
    assert task.rows_per_epoch == 3 * len(task.train)
    found = {e.id: e for e in every(task)}
    assert found["3"].holds == {0, 1}
    assert [(asked.source, asked.right) for asked in found["3"].asked(task.form)] == [
        ("text 2\nx:", 1),
        ("text 2\ny:", 1),
        ("text 2\nz:", 0),
    ]


@pytest.mark.parametrize("by", ["column", "text", "number"])
def test_the_right_choice_is_named_in_one_of_three_ways(tmp_path: Path, by: str) -> None:
    rows = []
    for n in range(30):
        columns = {"A": f"p{n}", "B": f"q{n}", "C": f"r{n}" if n % 2 else ""}
        right = n % (3 if n % 2 else 2)
        named = {"column": list(columns)[right], "text": list(columns.values())[right], "number": str(right)}
        rows.append({"text": f"text {n}", **columns, "label": named[by]})
    task = load(write(tmp_path / "a.csv", rows), choices=["A", "B", "C"])
    assert (task.kind, task.labels, task.answers) == ("multiple_choice", ("A", "B", "C"), ())
    found = {e.id: e for e in every(task)}
    assert (found["4"].choices, found["4"].label) == ((" p3", " q3", " r3"), 0)
    assert (found["5"].choices, found["5"].label) == ((" p4", " q4"), 0)


def test_choices_may_be_a_list_and_answers_free(tmp_path: Path) -> None:
    rows = [{"text": f"{n} + {n}?", "options": [str(n), str(2 * n)], "label": 1} for n in range(5, 30)]
    task = load(write(tmp_path / "a.jsonl", rows), choices=["options"])
    assert (task.labels, {e.label for e in every(task)}) == (("0", "1"), {1})
    task = load(write(tmp_path / "b.csv", plain(*map(str, range(20)))), kind="free_answer", max_new_tokens=3)
    assert (task.kind, task.labels, task.form.max_new_tokens) == ("free_answer", (), 3)
    assert {e.answer for e in every(task)} == {f" {n}" for n in range(20)}


def test_test_rows_are_found_in_training_text_by_group_id_and_text(tmp_path: Path) -> None:
    rows = plain(*"ab" * 8, split="train")
    rows.append({"id": "17", "text": "seen", "label": "a", "split": "test"})
    rows.append({"id": "18", "text": "new", "label": "b", "split": "test"})
    task = load(write(tmp_path / "a.csv", rows))
    assert task.overlap({content_id("seen"), "x"}) == 1
    assert task.overlap({"18", content_id("seen")}) == 2
    assert task.overlap({content_id("text 1"), "1"}) == 0
    grouped = load(write(tmp_path / "b.csv", [{**row, "group": f"g{n // 2}"} for n, row in enumerate(rows)]))
    assert grouped.overlap({"g8"}) == 1


UNUSABLE: list[tuple[list[dict[str, Any]] | str, dict[str, Any], str]] = [
    (
        plain(*"ab"),
        {"text_field": "txet"},
        r"'txet' \(task.text_field\) \(did you mean 'text'\?\); it has 'text', 'label'",
    ),
    (plain(*"ab"), {"label_field": "lable"}, r"no column 'lable' \(task.label_field\) \(did you mean 'label'"),
    (plain(*"ab"), {"group_field": "patient"}, "no column 'patient'"),
    (plain(*"ab"), {"template": "{text} {titel}"}, "no column 'titel'"),
    (plain(*"ab"), {"label_field": "text"}, "a model would read the right answer"),
    (plain(*"a" * 30), {}, "the training rows have only the label 'a' in label; a task has at least 2"),
    (plain(*"ab" * 15, ""), {}, "line 32: label is empty"),
    ("", {}, "the file is empty"),
    ("text,label\n", {}, "the file has no rows"),
    ("text,label\na\n", {}, "line 2: 1 cells"),
    (plain(*"ab"), {}, "2 rows in 2 groups or texts leave none for test"),
    (
        plain(*"ab" * 9, split="train") + plain("c", split="test"),
        {},
        "line 20: the label 'c' of this test row is on no training row",
    ),
    (plain(*"ab" * 9, split="train"), {}, "no row is marked test"),
    (plain(*"ab" * 9, split="both"), {}, "split='both' is no split; allowed are train, training, validation"),
    (plain(*"ab" * 9), {"labels": ["a", "bb"]}, r"label='b' is not one of task.labels=\['a', 'bb'\]"),
    (plain(*"ab" * 9), {"answers": {"c": " x"}}, "'c' is no label"),
    (plain(*"ab" * 9), {"answers": {"a": " b"}}, "two labels have the answer ' b'"),
    (plain(*map(str, range(3000))), {}, "labels in label, in 3000 rows; at most 1000 .* task.kind=free_answer"),
    (plain(*"ab" * 9), {"kind": "several_labels"}, "must be a list of labels, or task.label_separator"),
    (plain(*["a;a"] * 9), {"label_separator": ";"}, "has a label twice"),
    (plain(*"ab" * 9, A="x", B="x"), {"choices": ["A", "B"]}, r"two of the choices \('x', 'x'\) are the same"),
    (plain(*"CA" * 9, A="x", B="y"), {"choices": ["A", "B"]}, "label='C' is none of the 2 choices"),
    (plain(*"01" * 9, A="1", B="0"), {"choices": ["A", "B"]}, "the text of a choice or its number from 0"),
    (plain(*"ab" * 9), {"kind": "one"}, "task.kind='one' is not one of one_label"),
    (plain(*"ab" * 9), {"test_fraction": 1.0}, "task.test_fraction=1.0"),
    (plain(*"ab" * 9), {"hub_name": "a/b"}, "task.hub_name=a/b: task file does not take it; it is for hub"),
    (plain(*"ab" * 9), {"path": None}, "task.path is missing"),
]


@pytest.mark.parametrize(("rows", "changes", "message"), UNUSABLE, ids=[case[2][:40] for case in UNUSABLE])
def test_what_cannot_be_used_is_one_line(
    tmp_path: Path, rows: list[dict[str, Any]] | str, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "a.csv"
    if isinstance(rows, str):
        path.write_text(rows)
    else:
        write(path, rows)
    with pytest.raises(UserError, match=message) as caught:
        load_task(TaskConfig(**{**ALL, "path": str(path), **changes}))
    assert "\n" not in str(caught.value)


def test_the_command_line_refuses_with_one_line_and_leaves_nothing(shell: Any, tmp_path: Path) -> None:
    shell.trained()
    empty, good = tmp_path / "empty.csv", write(tmp_path / "a.csv", awkward())
    empty.write_text("")
    words = ["init_from=run", "task=file", "budget.steps=2", "run_dir=tuned"]
    assert "the file is empty" in shell.refused("finetune", *words, f"task.path={empty}")
    assert "no column 'body'" in shell.refused("finetune", *words, f"task.path={good}", "task.text_field=body")
    assert "did you mean" in shell.refused("finetune", *words, f"task.path={good[:-5]}b.csv")


def test_the_fingerprint_of_one_label_is_that_of_the_json_of_all_of_it(tmp_path: Path) -> None:
    """Runs that were recorded before the other kinds existed have to be found again."""
    task = load(write(tmp_path / "a.csv", awkward(40)))
    splits = [[[e.id, e.source, e.label] for e in split] for split in (task.train, task.validation, task.test)]
    text = json.dumps([task.name, task.labels, task.answers, splits])
    assert task.fingerprint() == hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    path = write(tmp_path / "b.csv", awkward(40))
    prints = [load(path, **k).fingerprint() for k in ({}, {"length_rule": "byte"}, {"length_rule": "token"})]
    assert len(set(prints)) == 3
    assert load(path, length_rule="sum").fingerprint() == task.fingerprint()


class Hub(list[dict[str, Any]]):
    """Rows as `datasets` has them, whose labels are numbers with names."""

    column_names = ("text", "label")
    features = {"label": types.SimpleNamespace(names=["bad", "good"])}  # noqa: RUF012


def test_rows_of_the_hub_have_its_splits_and_names_of_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    parts = {"train": Hub(plain(*[0, 1] * 10)), "test": Hub(plain(-1, -1)), "validation": Hub(plain(1, 0, 1))}
    module = types.ModuleType("datasets")

    def load_dataset(name: str, config: str | None, split: str | None) -> Any:
        asked.append((name, config, split))
        return parts

    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    hub = {**ALL, "name": "hub", "hub_name": "some/set", "hub_config": "small"}
    task = load_task(TaskConfig(**hub, hub_splits={"train": "train", "test": "validation"}))
    assert asked == [("some/set", "small", None)]
    assert (task.labels, [e.label for e in task.test]) == (("bad", "good"), [1, 0, 1])
    assert len(task.train) + len(task.validation) == 20
    with pytest.raises(UserError, match="hub data set some/set, test row 1: label=-1 is no label"):
        load_task(TaskConfig(**hub))
    parts.pop("test")
    with pytest.raises(UserError, match=r"its splits are train, validation; say .* task.hub_splits"):
        load_task(TaskConfig(**hub))
    parts.pop("validation")
    assert len(every(load_task(TaskConfig(**hub)))) == 20
    with pytest.raises(UserError, match=r"task\.hub_name is missing"):
        load_task(TaskConfig(**{**hub, "hub_name": None}))
