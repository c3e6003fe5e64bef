"""The source ``key_values``: its documents are taken apart, and have the form of the retrieval probe."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from sparsetrain.data import DataConfig, prepare_corpora
from sparsetrain.data.sources.key_values import KeyValues, key_values
from sparsetrain.data.sources.pairs import KeyValuesConfig
from sparsetrain.errors import UserError
from sparsetrain.settings import build
from sparsetrain.training.probes import retrieval_probe


@given(marks=st.integers(2, 8), questions=st.integers(1, 6), number=st.integers(0, 99), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_each_question_repeats_a_pair_above_it(marks: int, questions: int, number: int, seed: int) -> None:
    config = KeyValuesConfig(shortest=160, longest=300, questions=questions, marks=marks, seed=seed)
    text = key_values(config, number)
    rows = text.splitlines()
    assert text == "".join(f"{row}\n" for row in rows)
    assert all(len(row) == 2 * marks + 1 and row[:marks].isalpha() and row[marks + 1 :].isdigit() for row in rows)
    pairs, asked = rows[:-questions], rows[-questions:]
    assert len({row.split()[0] for row in pairs}) == len({row.split()[1] for row in pairs}) == len(pairs)
    assert set(asked) <= set(pairs)
    assert 160 - 2 * (marks + 1) < len(text) <= 300


@pytest.mark.parametrize("marks", [2, 6])
def test_a_probe_with_its_answer_is_a_document_of_one_question(marks: int) -> None:
    config = KeyValuesConfig(shortest=200, longest=200, questions=1, marks=marks)
    probe = retrieval_probe(200, 0, 0, marks)
    text, document = f"{probe.prompt}{probe.answer}\n", key_values(config, 0)
    assert len(text) == len(document)
    assert [mark.isalpha() for mark in text] == [mark.isalpha() for mark in document]
    assert text.splitlines()[-1] in text.splitlines()[:-1]


def test_documents_follow_from_their_settings() -> None:
    few, many = (list(KeyValues(KeyValuesConfig(documents=n)).documents()) for n in (5, 9))
    assert many[:5] == few
    assert len({document.text for document in many}) == 9
    other = KeyValuesConfig(documents=5, seed=1)
    assert not {d.text for d in few} & {d.text for d in KeyValues(other).documents()}
    assert KeyValues(other).identity() != KeyValues(KeyValuesConfig(documents=5)).identity()


def test_it_is_a_corpus_of_a_mixture(tmp_path: Any) -> None:
    (tmp_path / "prose.txt").write_text("\n\n".join(f"A paragraph of prose, number {n}." for n in range(60)))
    sources = {
        "prose": {"path": str(tmp_path / "prose.txt")},
        "pairs": {"name": "key_values", "key_values": {"documents": 60, "marks": 3}},
    }
    config = build(DataConfig, {"sources": sources, "tokenizer": "bytes"})
    corpora = prepare_corpora(config, console=Console(file=io.StringIO()))
    about = corpora["pairs"].manifest["built_from"]
    assert (about["source"], about["documents"], about["marks"]) == ("key_values", 60, 3)
    assert corpora["pairs"].manifest["splits"]["validation"]["documents"] > 0


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"documents": 1}, "data.key_values.documents=1 must be at least 2"),
        ({"marks": 0}, "data.key_values.marks=0 must be from 1 to 12"),
        ({"shortest": 60}, "data.key_values.shortest=60 is too small; a pair and questions=4 need 70 bytes"),
        ({"longest": 100}, "data.key_values.longest=100 must be at least shortest=128"),
        ({"marks": 1}, "data.key_values.longest=256 has 60 pairs; marks=1 gives 10 values"),
        ({"mark": 1}, "data.key_values.mark is no setting"),
    ],
)
def test_settings_out_of_range_are_refused(given_: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(DataConfig, {"name": "key_values", "key_values": given_}, "data.")
