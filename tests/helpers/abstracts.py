"""Articles of MEDLINE as elements of XML, for a wheel that a test makes."""

from __future__ import annotations

import gzip

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
    """Return an unstructured abstract whose text depends on its number."""
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
