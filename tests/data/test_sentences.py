"""The sentence splitter on decimals, abbreviations and initials, which abstracts are full of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.data.medline.sentences import split_sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["The drop was significant (p < 0.05).", "No harm was seen."],
        ["The drop was significant, p < 0.05.", "We saw no harm."],
        ["Doses of 1.5 vs. 3.0 mg were compared.", "Both worked."],
        ["Fruit, e.g. Apples, was eaten.", "Others, i.e. Nuts, were not."],
        ["Smith et al. Showed this in Fig. 2 and Ref. 7.", "It holds."],
        ["Cultures of E. coli and S. Typhimurium grew.", "They were kept at 37 °C."],
        ["They lacked vitamin D.", "The rest did not."],
        ["The drug was given i.v. Doses varied."],
        ["The drug was given i.v.", "This was safe."],
        ["Data are from the U.S. Census of 2010.", "In 2011, there was none."],
        ["Is it safe?", "Yes!", "(It was tested.)", "12 patients agreed."],
        ['He said "enough."', '"Never," said she.'],
        ["Sample no. 12 was lost.", "Was it found?", "No.", "It was not."],
        ["The trial (NCT01234567; clinicaltrials.gov) was stopped.", "Dr. Jones agreed."],
        ["Lactobacillus spp. Were found."],
        ["One sentence without an end"],
        [],
    ],
    ids=lambda sentences: (sentences or ["empty"])[0][:30],
)
def test_sentences_of_abstracts(sentences: list[str]) -> None:
    assert split_sentences("  ".join(sentences)) == sentences


@given(st.text(alphabet=st.sampled_from("aB. ?!()1\n\"'"), max_size=60) | st.text())
def test_splitting_only_changes_white_space(text: str) -> None:
    sentences = split_sentences(text)
    assert " ".join(sentences).split() == text.split()
    assert all(sentence == sentence.strip() and sentence for sentence in sentences)
