"""The split is a function of the id alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.data.split import assign, check_fractions, position, split_of
from sparsetrain.errors import UserError


def test_shares_match_the_binomial_distribution() -> None:
    splits = [split_of(str(number)) for number in range(20_000)]
    # Five standard deviations of a binomial count.
    assert abs(splits.count("test") - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5
    assert abs(splits.count("validation") - 400) < 5 * (20_000 * 0.02 * 0.98) ** 0.5


def test_known_ids_keep_their_split() -> None:
    """A change of the hash would put test documents of published runs into train."""
    splits = [split_of(str(number), 0.25, 0.25) for number in range(12)]
    assert splits == [
        "validation",
        "validation",
        "test",
        "train",
        "train",
        "validation",
        "validation",
        "train",
        "train",
        "train",
        "test",
        "train",
    ]


@given(st.text(), st.floats(0, 0.45), st.floats(0, 0.45))
def test_the_test_set_does_not_depend_on_the_validation_fraction(name: str, validation: float, test: float) -> None:
    assert (split_of(name, validation, test) == "test") == (split_of(name, 0.0, test) == "test")
    assert 0.0 <= position(name) < 1.0


def test_fractions_of_zero_and_of_everything() -> None:
    assert {split_of(str(number), 0.0, 0.0) for number in range(100)} == {"train"}
    assert "train" not in {split_of(str(number), 0.5, 0.5) for number in range(100)}


@given(
    st.lists(st.tuples(st.text(max_size=3), st.integers(1, 5000)), min_size=2, max_size=40),
    st.sampled_from([0.0, 0.02, 0.3]),
)
def test_assign_gives_two_disjoint_splits_that_are_not_empty(
    documents: list[tuple[str, int]], validation: float
) -> None:
    ids = [name for name, _ in documents]
    if len(set(ids)) < 2:
        with pytest.raises(UserError, match="at least 2"):
            assign(ids, [size for _, size in documents], validation, 0.0)
        return
    splits = assign(ids, [size for _, size in documents], validation, 0.0)
    by_split = {split: {ids[i] for i, own in enumerate(splits) if own == split} for split in ("train", "validation")}
    assert by_split["train"]
    assert by_split["validation"]
    assert not by_split["train"] & by_split["validation"]


def test_a_document_of_more_than_half_of_the_text_stays_in_train() -> None:
    for number in range(20):
        ids = [f"large {number}", f"small {number}"]
        assert assign(ids, [10_000, 100], 0.0, 0.0) == ["train", "validation"]


def test_assign_of_a_large_corpus_is_split_of() -> None:
    ids = [str(number) for number in range(3000)]
    assert assign(ids, [1000] * 3000, 0.02, 0.1) == [split_of(name) for name in ids]


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.0), (1.0, 0.0), (0.0, 1.5), (0.5, 0.5)])
def test_impossible_fractions_are_refused(validation: float, test: float) -> None:
    with pytest.raises(UserError, match="fraction"):
        check_fractions(validation, test)
