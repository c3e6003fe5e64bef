"""The ids of the abstracts behind PubMedQA's questions, on which no corpus of MEDLINE may train."""

from __future__ import annotations

from importlib import resources


def _pmids(name: str) -> frozenset[str]:
    text = resources.files("sparsetrain.data.medline").joinpath(name).read_text(encoding="utf-8")
    return frozenset(line for line in text.split("\n") if line and not line.startswith("#"))


def expert_pmids() -> frozenset[str]:
    """Return the PMIDs of the 1000 expert-labelled questions; no corpus may train on their abstracts."""
    return _pmids("pubmedqa_pmids.txt")


def official_test_pmids() -> frozenset[str]:
    """Return the PMIDs of the official test set, which the copy on the hub does not mark."""
    return _pmids("pubmedqa_test_pmids.txt")
