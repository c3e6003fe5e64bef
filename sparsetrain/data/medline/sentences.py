"""Splits scientific English into sentences."""

from __future__ import annotations

import re

# A full stop after these abbreviations does not end a sentence, except after "no", see `_ends`.
# fmt: off
_ABBREVIATIONS = frozenset((
    "e.g", "i.e", "vs", "cf", "al", "ca", "approx", "fig", "figs", "ref", "refs", "eq", "eqs", "no",
    "nos", "vol", "ed", "eds", "dr", "prof", "mr", "mrs", "ms", "st", "mt", "resp", "incl", "viz", "sp",
    "spp", "ssp", "subsp", "var", "gen", "nov", "sect", "chap", "dept", "univ",
))
# fmt: on
# After an initial or a dotted abbreviation ("vitamin D.", "J. Smith", "i.v."), only these words begin a new sentence.
# fmt: off
_OPENERS = frozenset((
    "A", "After", "All", "Although", "An", "Analysis", "As", "At", "Because", "Both", "But", "By",
    "Compared", "Conclusion", "Conversely", "Data", "Despite", "During", "Each", "Finally", "Findings",
    "For", "From", "Further", "Furthermore", "Here", "However", "If", "In", "Interestingly", "It",
    "Its", "Moreover", "Most", "Neither", "No", "None", "On", "One", "Only", "Our", "Overall",
    "Participants", "Patients", "Results", "Significant", "Similarly", "Since", "Six", "Some",
    "Subjects", "Such", "That", "The", "Their", "Then", "There", "Therefore", "These", "They", "This",
    "Those", "Three", "Thus", "To", "Total", "Two", "Under", "Using", "We", "When", "Whereas",
    "Whether", "Which", "While", "With", "Within",
))
# fmt: on
# An end mark with closing brackets and quotes, white space, and a word or digit that can begin a sentence.
_CANDIDATE = re.compile(r"[.!?][)\]\"'\u201d\u2019]*\s+(?=[(\[\"'\u201c\u2018]*([A-Z][A-Za-z]*|\d))")
_LAST_WORD = re.compile(r"[^\s(\[\"'\u201c\u2018]*$")
_LONGEST_WORD = 40  # characters before a full stop that are searched for its word
_DOTTED = re.compile(r"(?:[A-Za-z]\.)*[A-Za-z]")


def _ends(before: str, following: str) -> bool:
    """Return whether the full stop after ``before`` ends a sentence, given the word or digit that follows."""
    match = _LAST_WORD.search(before)
    word = match.group() if match else ""
    if word.lower() in _ABBREVIATIONS:
        # "no." is an abbreviation only before a number. The others are hardly ever the last word of a sentence.
        return word.lower() == "no" and not following.isdigit()
    if _DOTTED.fullmatch(word):
        return following in _OPENERS
    return True


def split_sentences(text: str) -> list[str]:
    """Return the sentences of ``text``; joined by single spaces, they give ``text`` with its spaces normalised.

    A sentence ends at ``.``, ``!`` or ``?`` before white space and a capital letter or digit, which may follow an
    opening bracket or quote. The words around a full stop show whether it belongs to a decimal ("p < 0.05. The"), an
    abbreviation ("e.g.", "vs.", "et al.", "Fig. 2") or an initial ("E. coli", "J. Smith").
    """
    text = " ".join(text.split())
    sentences = []
    start = 0
    for match in _CANDIDATE.finditer(text):
        mark = match.start()
        if text[mark] == "." and not _ends(text[max(start, mark - _LONGEST_WORD) : mark], match.group(1)):
            continue
        sentences.append(text[start : match.end()].strip())
        start = match.end()
    rest = text[start:].strip()
    return [*sentences, rest] if rest else sentences
