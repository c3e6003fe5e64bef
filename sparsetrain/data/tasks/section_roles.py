"""Section roles: the section of an abstract that a sentence is from, as in PubMed RCT (arXiv 1710.06071), on MEDLINE.

The label of a sentence is NLM's category of its section. The split of an abstract is the same function of its id as in
the pre-training corpus, so neither stage trains on a sentence of the test abstracts.
"""

from __future__ import annotations

from collections.abc import Iterable

from sparsetrain.data.medline.sentences import split_sentences
from sparsetrain.data.medline.source import Medline, is_parsed
from sparsetrain.data.sources.base import Document
from sparsetrain.data.sources.registry import PMID
from sparsetrain.data.split import Split, split_of
from sparsetrain.data.tasks.base import Example, Task, take
from sparsetrain.data.tasks.registry import TaskConfig, register_task
from sparsetrain.errors import UserError

CATEGORIES = ("BACKGROUND", "OBJECTIVE", "METHODS", "RESULTS", "CONCLUSIONS")
_CUE = "\nrole:"
_SHORTEST = 20  # characters; shorter strings are debris such as "NCT01234567."


def examples(documents: Iterable[Document]) -> dict[Split, list[Example]]:
    """Return all labelled sentences, by split; the id of sentence n of an abstract is ``PMID/n``.

    A sentence that occurred before (mostly registry notices) is left out, so that no sentence is in two splits.
    """
    found: dict[Split, list[Example]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for document in documents:
        number = 0
        for section in document.sections:
            if section.category not in CATEGORIES:
                continue
            label = CATEGORIES.index(section.category)
            for sentence in split_sentences(section.text):
                if len(sentence) < _SHORTEST or sentence in seen:
                    continue
                seen.add(sentence)
                found[split_of(document.id)].append(Example(f"{document.id}/{number}", sentence + _CUE, label))
                number += 1
    return found


def _is_local(_config: TaskConfig) -> bool:
    return is_parsed()


@register_task("section_roles", is_local=_is_local, ids=PMID)
def load(config: TaskConfig) -> Task:
    """Return the task, with the labels in their natural proportions."""
    found = examples(Medline().documents())
    for split, members in found.items():
        if not members:
            raise UserError(f"task section_roles: no {split} example in the corpus")
    return Task(
        name="section_roles",
        labels=tuple(category.lower() for category in CATEGORIES),
        answers=tuple(f" {category.lower()}" for category in CATEGORIES),
        train=take(found["train"], config.n_train, config.seed),
        validation=take(found["validation"], config.n_validation, config.seed),
        test=take(found["test"], config.n_test, config.seed),
        template=f"{{text}}{_CUE}",
    )
