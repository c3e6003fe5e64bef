"""Where a sentence of scientific English ends."""

from __future__ import annotations

import re

# A full stop after these does not end a sentence, whatever follows.
# fmt: off
_ABBREVIATIONS = frozenset((
    "e.g", "i.e", "vs", "cf", "al", "ca", "approx", "fig", "figs", "ref", "refs", "eq", "eqs", "no",
    "nos", "vol", "ed", "eds", "dr", "prof", "mr", "mrs", "ms", "st", "mt", "resp", "incl", "viz", "sp",
    "spp", "ssp", "subsp", "var", "gen", "nov", "sect", "chap", "dept", "univ",
))
# fmt: on
# After an initial or a dotted abbreviation ("vitamin D.", "J. Smith", "i.v.") only these words open a new sentence.
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
# End marks with the brackets and quotes that close after them, white space, and what can begin a sentence.
_CANDIDATE = re.compile(r"[.!?][)\]\"'\u201d\u2019]*\s+(?=[(\[\"'\u201c\u2018]*([A-Z][A-Za-z]*|\d))")
_LAST_WORD = re.compile(r"[^\s(\[\"'\u201c\u2018]*$")
_LONGEST_WORD = 40  # characters looked at before a full stop
_DOTTED = re.compile(r"(?:[A-Za-z]\.)*[A-Za-z]")


def _ends(before: str, following: str) -> bool:
    """Tell whether the full stop after ``before`` ends a sentence, given the word or digit that follows."""
    match = _LAST_WORD.search(before)
    word = match.group() if match else ""
    if word.lower() in _ABBREVIATIONS:
        # "no." is an abbreviation before a number only, and "var." and the like are never the last word.
        return word.lower() == "no" and not following.isdigit()
    if _DOTTED.fullmatch(word):
        return following in _OPENERS
    return True


def split_sentences(text: str) -> list[str]:
    """Return the sentences of ``text``; joined by single spaces they are ``text`` with its spaces normalised.

    A sentence ends at ``.``, ``!`` or ``?`` before white space and a capital letter, a digit, or an opening bracket
    or quote.
    Decimals ("p < 0.05. The"), abbreviations ("e.g.", "vs.", "et al.", "Fig. 2") and initials ("E. coli", "J. Smith")
    are told apart by the words around the mark.
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
