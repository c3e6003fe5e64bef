"""The labelled tasks: their examples, and test documents outside of the training text."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from sparsetrain.data import DataConfig, TaskConfig, load_task, prepare
from sparsetrain.data.medline.held_out import expert_pmids, official_test_pmids
from sparsetrain.data.sources.base import Document, Section
from sparsetrain.data.sources.wheel import Wheel
from sparsetrain.data.split import split_of
from sparsetrain.data.tasks.base import Example, Task, take
from sparsetrain.data.tasks.section_roles import CATEGORIES, examples
from sparsetrain.errors import UserError


def small_task(train: list[int], test: list[int]) -> Task:
    own = [Example(f"train{number}", "q", label) for number, label in enumerate(train)]
    held_out = [Example(f"test{number // 2}/{number}", "q", label) for number, label in enumerate(test)]
    return Task("t", ("a", "b", "c"), (" a", " b", " c"), own, own, held_out)


def test_majority_is_that_of_the_training_labels() -> None:
    assert small_task([0, 1, 1, 2], [0, 0, 0, 1]).majority() == 0.25
    assert small_task([2, 2, 1, 1], [1, 1, 2]).majority() == pytest.approx(2 / 3)  # a tie goes to the first label


def test_overlap_counts_documents_not_sentences() -> None:
    task = small_task([0], [0, 1, 2, 0])
    assert task.overlap({"test0", "train0"}) == 1
    assert task.overlap({"test0", "test1"}) == 2
    assert task.overlap(set()) == 0


def test_take_is_nested_and_depends_on_the_seed() -> None:
    every = [Example(str(number), "q", 0) for number in range(100)]
    assert take(every, 30, 0) == take(reversed(every), 60, 0)[:30]
    assert take(every, 30, 0) != take(every, 30, 1)
    assert len(take(every, 300, 0)) == 100


def test_examples_of_one_id_are_drawn_apart() -> None:
    every = [Example(str(number % 10), "q", number % 2) for number in range(3000)]
    drawn = take(every, 100, 0)
    assert len({example.id for example in drawn}) == 10
    assert 25 < sum(example.label for example in drawn) < 75
    assert take(every, 30, 0) == drawn[:30]


def test_section_roles_follow_sections_and_the_one_split() -> None:
    documents = [
        Document(
            str(number),
            "",
            sections=(
                Section("AIM", "OBJECTIVE", f"We asked question {number}. It is the question {number}."),
                Section("ETHICS", "UNASSIGNED", f"This study {number} was approved by all."),
                Section("RESULTS", "RESULTS", f"There were {number} of them (p < 0.05). Short. Yes."),
            ),
        )
        for number in range(200)
    ]
    found = examples(documents)
    everything = [example for split in found.values() for example in split]
    assert len(everything) == 3 * 200
    assert all(split_of(example.document) == split for split, members in found.items() for example in members)
    by_id = {example.id: example for example in everything}
    assert by_id["7/0"] == Example("7/0", "We asked question 7.\nrole:", CATEGORIES.index("OBJECTIVE"))
    assert by_id["7/2"] == Example("7/2", "There were 7 of them (p < 0.05).\nrole:", CATEGORIES.index("RESULTS"))


def test_a_sentence_stands_in_one_split_only() -> None:
    section = (Section("METHODS", "METHODS", "The trial was registered at the usual place."),)
    found = examples([Document(str(number), "", sections=section) for number in range(500)])
    assert sum(len(members) for members in found.values()) == 1


def test_section_roles_of_a_wheel(small_medline: Wheel) -> None:
    task = load_task(TaskConfig(n_train=200, n_validation=5, n_test=50))
    assert (len(task.train), len(task.validation), len(task.test)) == (200, 5, 50)
    assert task.labels == ("background", "objective", "methods", "results", "conclusions")
    assert task.answers == tuple(f" {label}" for label in task.labels)
    for example in task.train:
        assert task.labels[example.label] in example.source or example.source.startswith("It says p < 0.05 in case")
    corpus = prepare(DataConfig(tokenizer="bytes"), progress=False)
    assert task.overlap(corpus.train_ids()) == 0
    assert task.overlap({example.document for example in task.test}) > 0


def write_pubmedqa(folder: Path, rows: Any, test: list[str]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "ori_pqal.json").write_text(json.dumps(rows))
    (folder / "test_ground_truth.json").write_text(json.dumps(dict.fromkeys(test, "yes")))
    return str(folder)


def rows_of(count: int) -> dict[str, Any]:
    return {
        str(number): {
            "QUESTION": f"Is {number} even?",
            "CONTEXTS": ["We looked.", "It was."],
            "final_decision": ("yes", "no", "maybe")[number % 3],
        }
        for number in range(count)
    }


def row(**changes: Any) -> dict[str, Any]:
    return {"QUESTION": "Is it?", "CONTEXTS": ["It was."], "final_decision": "yes", **changes}


def test_pubmedqa_keeps_the_official_test_set(tmp_path: Path) -> None:
    official = [str(number) for number in range(0, 1000, 2)]
    path = write_pubmedqa(tmp_path / "q", rows_of(1000), official)
    task = load_task(TaskConfig(name="pubmedqa", path=path))
    assert {example.id for example in task.test} == set(official)
    assert (len(task.train), len(task.validation)) == (450, 50)
    ids = [{example.id for example in split} for split in (task.train, task.validation, task.test)]
    assert len(set.union(*ids)) == 1000
    other = load_task(TaskConfig(name="pubmedqa", path=path, seed=1, n_train=100))
    assert {example.id for example in other.train} < ids[0]
    assert {example.id for example in other.validation} == ids[1]
    (seven,) = (example for example in (*task.train, *task.validation) if example.id == "7")
    assert seven == Example("7", "We looked. It was.\nquestion: Is 7 even?\nanswer:", 1)


def test_packaged_identifiers_are_a_thousand_with_half_of_them_for_test() -> None:
    assert len(expert_pmids()) == 1000
    assert len(official_test_pmids()) == 500
    assert official_test_pmids() < expert_pmids()
    assert all(pmid.isdigit() for pmid in expert_pmids())


def test_pubmedqa_from_the_hub_has_the_official_test_set(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "pubid": int(pmid),
            "question": "Is it?",
            "context": {"contexts": ["It", "is."]},
            "final_decision": ("yes", "no")[int(pmid) % 2],
        }
        for pmid in sorted(expert_pmids())
    ]
    module = types.ModuleType("datasets")
    module.load_dataset = lambda name, config, split: rows  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    task = load_task(TaskConfig(name="pubmedqa"))
    assert {example.id for example in task.test} == official_test_pmids()
    assert (len(task.train), len(task.validation)) == (450, 50)


def test_pubmedqa_offline_tells_to_give_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"task\.path, a directory with ori_pqal\.json and test_ground_truth\.json"):
        load_task(TaskConfig(name="pubmedqa"))


@pytest.mark.parametrize(
    ("rows", "test", "message"),
    [
        ({"1": {"QUESTION": "q", "CONTEXTS": [], "final_decision": "perhaps"}}, [], "'perhaps' is not one of yes, no"),
        ({"1": {"QUESTION": "q", "CONTEXTS": []}}, [], "no field 'final_decision'"),
        ({"905": row(QUESTION=["is it?"])}, [], "question '905', question: the text is list, not a string"),
        ({"905": row(QUESTION=1.5)}, [], "question '905', question: the text is float"),
        ({"905": row(QUESTION="\ud800")}, [], "lone surrogate"),
        ({"905": row(CONTEXTS="some text")}, [], "question '905': its contexts are str, not a list of texts"),
        ({"905": row(CONTEXTS=["a", 3])}, [], "question '905', contexts: the text is int"),
        ({"905": row(final_decision=["yes"])}, [], r"final_decision=\['yes'\] is not one of"),
        ({"905": ["is it?"]}, [], r"905=\['is it\?'\] must be a mapping"),
        ({"\ud800": row()}, [], "lone surrogate"),
        (["is it?"], [], r"ori_pqal\.json holds .* must be a mapping"),
        (rows_of(5), ["77"], "1 PMIDs of test_ground_truth.json are not in"),
        (rows_of(5), [], "0 test questions"),
    ],
)
def test_unusable_pubmedqa_is_one_line(tmp_path: Path, rows: Any, test: list[str], message: str) -> None:
    path = write_pubmedqa(tmp_path / "q", rows, test)
    with pytest.raises(UserError, match=message) as caught:
        load_task(TaskConfig(name="pubmedqa", path=path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answers", [["1"], {"1": "perhaps"}, {"1": ["yes"]}])
def test_answers_of_another_kind_are_refused(tmp_path: Path, answers: Any) -> None:
    path = write_pubmedqa(tmp_path / "q", rows_of(5), [])
    (tmp_path / "q" / "test_ground_truth.json").write_text(json.dumps(answers))
    with pytest.raises(UserError, match=r"test_ground_truth\.json.* must be "):
        load_task(TaskConfig(name="pubmedqa", path=path))


@pytest.mark.parametrize("change", [{"question": ["Is it?"]}, {"context": None}, {"pubid": 1.5}, {"question": None}])
def test_a_hub_row_that_holds_no_text_is_refused(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"pubid": 1, "question": "Is it?", "context": {"contexts": ["It is."]}, "final_decision": "yes", **change}]
    module = types.ModuleType("datasets")
    module.load_dataset = lambda name, config, split: rows  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(UserError, match="hub data set qiaojin/PubMedQA, row 1: question"):
        load_task(TaskConfig(name="pubmedqa"))


def test_a_directory_without_the_files_names_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no ori_pqal\.json there; it must hold ori_pqal\.json and test_ground_truth"):
        load_task(TaskConfig(name="pubmedqa", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "section_role"}, "did you mean 'section_roles'"),
        ({"n_test": 0}, r"task\.n_test=0"),
        ({"path": "somewhere"}, "takes no path; a path is for file, pubmedqa"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TaskConfig(**fields)
