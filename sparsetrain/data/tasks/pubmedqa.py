"""PubMedQA (Jin et al. 2019, arXiv 1909.06146): yes, no or maybe, given an abstract without its conclusion.

The test set is the official one of 500 questions. The other 500 expert-labelled questions are divided into 450 for
training and 50 for validation.

The subset ``artificial`` has the same test set. It is trained on questions that were made from titles, whose answers
are yes or no; it leaves out the 1000 expert-labelled ones.
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from sparsetrain.data.medline.held_out import expert_pmids, official_test_pmids
from sparsetrain.data.sources.base import check_text, clean_id
from sparsetrain.data.sources.hub import load_rows
from sparsetrain.data.sources.registry import PMID
from sparsetrain.data.split import position
from sparsetrain.data.tasks.base import Example, Task, take
from sparsetrain.data.tasks.registry import TaskConfig, register_task
from sparsetrain.errors import UserError, check_choice
from sparsetrain.files import typed_path
from sparsetrain.reading import read_json

LABELS = ("yes", "no", "maybe")
_Label = Annotated[str, Meta(pattern=rf"^({'|'.join(LABELS)})\Z")]
QUESTIONS_FILE = "ori_pqal.json"
TEST_FILE = "test_ground_truth.json"
ARTIFICIAL_FILE = "ori_pqaa.json"
SUBSETS = (LABELLED, ARTIFICIAL) = ("labelled", "artificial")
_HUB, _CONFIGS, _SPLIT = "qiaojin/PubMedQA", {LABELLED: "pqa_labeled", ARTIFICIAL: "pqa_artificial"}, "train"
_N_VALIDATION = {LABELLED: 50, ARTIFICIAL: 500}
_MOST_BYTES = 1 << 30  # 211,000 artificial questions with their abstracts need more than other files


def _example(pmid: object, question: object, contexts: object, decision: object, where: str) -> Example:
    """Return the example of a question; a field that is not text raises `UserError` instead of being converted."""
    place = f"{where}: question {reprlib.repr(pmid)}"
    if decision not in LABELS:
        raise UserError(f"{place}: final_decision={reprlib.repr(decision)} is not one of {', '.join(LABELS)}")
    if not isinstance(contexts, list):
        raise UserError(f"{place}: its contexts are {type(contexts).__name__}, not a list of texts")
    paragraphs = " ".join(check_text(context, f"{place}, contexts") for context in contexts)
    # The question and the cue come last, since a source that is too long loses tokens on its left.
    source = f"{paragraphs}\nquestion: {check_text(question, f'{place}, question')}\nanswer:"
    return Example(clean_id(pmid, place), source, LABELS.index(decision))


def _read_json(path: Path, shape: Any) -> dict[str, Any]:
    if not path.is_file():
        files = f"{QUESTIONS_FILE} and {TEST_FILE}"
        raise UserError(
            f"task.path={path.parent}: no {path.name} there; it must hold {files} of "
            "https://github.com/pubmedqa/pubmedqa"
            + (f", and for task.subset={ARTIFICIAL} {ARTIFICIAL_FILE}" if path.name == ARTIFICIAL_FILE else "")
        )
    content: dict[str, Any] = read_json(path, shape, finite=False, max_bytes=_MOST_BYTES)
    return content


def _questions(path: Path) -> list[Example]:
    """Return the questions of a file, by their PMIDs."""
    examples = []
    for pmid, row in _read_json(path, dict[str, dict[str, Any]]).items():
        if absent := [field for field in ("QUESTION", "CONTEXTS", "final_decision") if field not in row]:
            raise UserError(f"{path}: question {reprlib.repr(pmid)} has no field {absent[0]!r}")
        examples.append(_example(pmid, row["QUESTION"], row["CONTEXTS"], row["final_decision"], str(path)))
    return examples


def _from_directory(directory: Path) -> tuple[list[Example], frozenset[str]]:
    examples = _questions(directory / QUESTIONS_FILE)
    test = frozenset(_read_json(directory / TEST_FILE, dict[str, _Label]))
    if missing := test - {example.id for example in examples}:
        raise UserError(f"{directory}: {len(missing)} PMIDs of {TEST_FILE} are not in {QUESTIONS_FILE}")
    return examples, test


def _from_hub(subset: str) -> list[Example]:
    otherwise = f"give task.path, a directory with {QUESTIONS_FILE} and {TEST_FILE}"
    examples = []
    for number, row in enumerate(load_rows(_HUB, _CONFIGS[subset], _SPLIT, otherwise=otherwise), start=1):
        where, context = f"hub data set {_HUB}, row {number}", row.get("context")
        contexts = context.get("contexts") if isinstance(context, dict) else context
        examples.append(_example(row.get("pubid"), row.get("question"), contexts, row.get("final_decision"), where))
    return examples


def _is_local(config: TaskConfig) -> bool:
    return config.path is not None


@register_task("pubmedqa", takes_path=True, is_local=_is_local, ids=PMID, settings=("subset",))
def load(config: TaskConfig) -> Task:
    """Return the task, from the directory ``path`` with the files of the public repository, or from the hub.

    The split of a question depends on neither ``seed`` nor the counts.

    Raises:
        UserError: the data cannot be read or used.
    """
    subset = config.subset or LABELLED
    check_choice("task.subset", subset, SUBSETS)
    if config.path is None:
        labelled, test_ids = _from_hub(LABELLED), official_test_pmids()
        examples = labelled if subset == LABELLED else _from_hub(subset)
    else:
        directory = typed_path(config.path, "task.path")
        labelled, test_ids = _from_directory(directory)
        examples = labelled if subset == LABELLED else _questions(directory / ARTIFICIAL_FILE)
    test = [example for example in labelled if example.id in test_ids]
    others = test_ids if subset == LABELLED else expert_pmids() | {example.id for example in labelled}
    rest = sorted(
        (example for example in examples if example.id not in others),
        key=lambda example: (position(example.id, "pubmedqa"), example.id),
    )
    n_held_out = min(_N_VALIDATION[subset], max(1, len(rest) // 10))
    if not test or len(rest) < 2:
        raise UserError(f"PubMedQA: {len(test)} test questions and {len(rest)} others are too few")
    return Task(
        name="pubmedqa",
        labels=LABELS,
        answers=tuple(f" {label}" for label in LABELS),
        train=take(rest[n_held_out:], config.n_train, config.seed),
        validation=take(rest[:n_held_out], config.n_validation, config.seed),
        test=take(test, config.n_test, config.seed),
        template="{context}\nquestion: {question}\nanswer:",
    )
