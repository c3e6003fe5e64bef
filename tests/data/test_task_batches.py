"""Rows of tasks against rows built by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.data.tasks.base import Example, Task
from sparsetrain.data.tasks.batches import TaskBatches
from sparsetrain.data.tasks.form import NO_YES, Form
from sparsetrain.data.tasks.scoring import question_batches, scored_tokens
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.data.tokens import IGNORED, Batch
from sparsetrain.errors import UserError

BYTES = Tokenizer.bytes()
EOS = BYTES.eos_id
ANSWERS = (" yes", " no", " maybe")


def examples(count: int) -> list[Example]:
    return [Example(str(number), f"q{'u' * (number * 7 % 23)} {number}?", number % 3) for number in range(count)]


def row(batch: Batch, index: int) -> tuple[list[int], list[int], list[int]]:
    slots = batch.slots if batch.slots is not None else torch.full_like(batch.tokens, -1)
    return batch.tokens[index].tolist(), batch.targets[index].tolist(), slots[index].tolist()


@pytest.mark.parametrize("n_slots", [0, 3])
def test_row_matches_one_built_by_hand(n_slots: int) -> None:
    batches = TaskBatches([Example("1", "abc?", 1)], BYTES, ANSWERS, 64, 4, seed=0, phase="x", n_slots=n_slots)
    tokens, targets, slots = row(batches.batch(0, 1), 0)
    full = [*b"abc?", *[EOS] * n_slots, *b" no", EOS]
    inputs, width = full[:-1], 8 if n_slots == 0 else 16
    padding = [EOS] * (width - len(inputs))
    assert tokens == inputs + padding
    before = 4 + n_slots - 1
    assert targets == [IGNORED] * before + [*b" no", EOS] + [IGNORED] * (width - before - 4)
    assert slots == [-1] * 4 + list(range(n_slots)) + [-1] * (width - 4 - n_slots)
    assert (batches.batch(0, 1).slots is None) == (n_slots == 0)


@given(length=st.integers(1, 60), context=st.integers(9, 40), n_slots=st.integers(0, 2), label=st.integers(0, 2))
def test_long_sources_lose_their_left_end_only(length: int, context: int, n_slots: int, label: int) -> None:
    source = "".join(chr(ord("a") + place % 26) for place in range(length))
    batches = TaskBatches([Example("1", source, label)], BYTES, ANSWERS, context, 1, 0, "x", n_slots)
    batch = batches.batch(0, 1)
    assert batch.tokens.shape[1] <= context
    tokens, targets, _ = row(batch, 0)
    answered = [token for token in targets if token != IGNORED]
    assert answered == [*ANSWERS[label].encode(), EOS]
    kept = bytes(tokens[: targets.index(answered[0]) + 1 - n_slots]).decode()
    assert source.endswith(kept)
    # The kept length does not depend on the label, since there is always room for the longest answer, " maybe".
    assert len(kept) == min(length, context - n_slots - len(" maybe"))


def test_no_room_for_a_source_is_refused() -> None:
    with pytest.raises(UserError, match=r"context=8 leaves no room .* 2 soft-prompt slots .* 6 tokens; use at least 9"):
        TaskBatches(examples(2), BYTES, ANSWERS, 8, 1, 0, "x", n_slots=2)
    with pytest.raises(UserError, match="example 5 has an empty source"):
        TaskBatches([Example("5", "", 0)], BYTES, ANSWERS, 64, 1, 0, "x")
    with pytest.raises(UserError, match="no examples"):
        TaskBatches([], BYTES, ANSWERS, 64, 1, 0, "x")
    with pytest.raises(UserError, match="batch_size=0"):
        TaskBatches(examples(2), BYTES, ANSWERS, 64, 0, 0, "x")


@given(count=st.integers(1, 70), batch_size=st.integers(1, 9), seed=st.integers(0, 2))
def test_each_epoch_has_every_example_once(count: int, batch_size: int, seed: int) -> None:
    batches = TaskBatches(examples(count), BYTES, ANSWERS, 64, batch_size, seed, "x")
    assert batches.examples_per_epoch == count
    for epoch in range(3):
        assert sorted(batches.indices(epoch * count, count)) == list(range(count))


def test_batches_do_not_depend_on_how_they_are_asked_for() -> None:
    whole = TaskBatches(examples(50), BYTES, ANSWERS, 64, 8, 0, "x", n_slots=2).batch(0, 120)
    other = TaskBatches(examples(50), BYTES, ANSWERS, 64, 8, 0, "x", n_slots=2)
    for first in (100, 40, 0):
        part = other.batch(first, 20)
        width = part.tokens.shape[1]
        assert torch.equal(part.tokens, whole.tokens[first : first + 20, :width])
        assert torch.equal(part.targets, whole.targets[first : first + 20, :width])
        assert part.slots is not None
        assert whole.slots is not None
        assert torch.equal(part.slots, whole.slots[first : first + 20, :width])


def test_seed_phase_and_epoch_change_the_order() -> None:
    def order(seed: int, phase: str, epoch: int) -> list[int]:
        return TaskBatches(examples(40), BYTES, ANSWERS, 64, 4, seed, phase).indices(epoch * 40, 40)

    orders = [order(0, "a", 0), order(1, "a", 0), order(0, "b", 0), order(0, "a", 1)]
    assert order(0, "a", 0) == orders[0]
    assert len({tuple(places) for places in orders}) == 4


def test_sorting_by_length_saves_padding() -> None:
    """This includes later epochs, which begin inside a batch."""
    rows = [Example(str(number), "x" * (1 + number * 37 % 100), 0) for number in range(403)]
    batches = TaskBatches(rows, BYTES, ANSWERS, 256, 8, 0, "x")
    cells = sum(batches.batch(first, 8).tokens.numel() for first in range(0, 403 * 4, 8))
    needed = 4 * sum(len(example.source) + len(" yes") for example in rows)
    unsorted = 4 * sum(
        8 * max(len(example.source) + 4 for example in rows[first : first + 8]) for first in range(0, 403, 8)
    )
    assert cells < 1.25 * needed < unsorted


@given(count=st.integers(1, 20), batch_size=st.integers(1, 16), n_slots=st.integers(0, 2))
def test_scoring_batches_hold_every_source_once(count: int, batch_size: int, n_slots: int) -> None:
    asked = examples(count)
    task = Task("t", ("yes", "no", "maybe"), ANSWERS, asked, asked, asked)
    seen = []
    for scored in question_batches(list(task.asked(asked)), BYTES, 64, n_slots, batch_size):
        assert len(scored.batch.tokens) == len(scored.examples) <= batch_size
        for place, index in enumerate(scored.examples.tolist()):
            seen.append(index)
            tokens, targets, slots = row(scored.batch, place)
            source = list(asked[index].source.encode())
            assert tokens == source + [EOS] * n_slots
            assert slots == [-1] * len(source) + list(range(n_slots))
            assert set(targets) == {IGNORED}
    assert sorted(seen) == list(range(count))


def test_the_end_is_scored_where_an_answer_begins_another() -> None:
    assert scored_tokens(ANSWERS[:2], BYTES) == [[*b" yes"], [*b" no"]]
    assert scored_tokens((" no", " none"), BYTES) == [[*b" no", EOS], [*b" none", EOS]]
    assert list(question_batches([], BYTES, 64)) == []


SEVERAL = Form("t", ("a", "b"), NO_YES, "{text} {label}?", "several_labels")
CHOICE = Form("t", (), (), "{text}", "multiple_choice", choices=("A", "B"))
FREE = Form("t", (), (), "{text}", "free_answer", max_new_tokens=7)


@pytest.mark.parametrize(
    ("form", "example", "rows"),
    [
        (SEVERAL, Example("1", "abc ", after="?", holds=frozenset({1})), [(b"abc a?", b" no"), (b"abc b?", b" yes")]),
        (CHOICE, Example("1", "abc", 1, choices=(" x", " wide")), [(b"abc", b" wide")]),
        (FREE, Example("1", "abc", answer=" is it"), [(b"abc", b" is it")]),
    ],
)
def test_rows_of_the_other_kinds_match_ones_built_by_hand(
    form: Form, example: Example, rows: list[tuple[bytes, bytes]]
) -> None:
    batches = TaskBatches([example] * 3, BYTES, form, 64, 2, seed=0, phase="x", n_slots=1)
    assert batches.examples_per_epoch == 3 * len(rows)
    batch = batches.batch(0, 3 * len(rows))
    found = []
    for index in range(3 * len(rows)):
        tokens, targets, slots = row(batch, index)
        source, said = bytes(tokens[: slots.index(0)]), [token for token in targets if token != IGNORED]
        assert said[-1] == EOS
        found.append((source, bytes(said[:-1])))
        assert bytes(tokens[slots.index(0) + 1 :][: len(said) - 1]) == bytes(said[:-1])
    assert sorted(found) == sorted(rows * 3)


def test_a_source_leaves_room_for_the_longest_answer_of_its_question() -> None:
    choices = [Example("1", "x" * 50, 0, choices=(" x", " wide")), Example("2", "x" * 50, 1, choices=(" x", " y"))]
    batch = TaskBatches(choices, BYTES, CHOICE, 20, 2, 0, "x").batch(0, 2)
    kept = sorted(row(batch, index)[0].count(ord("x")) for index in range(2))
    assert kept == [15 + 1, 18]  # " wide" leaves 15 tokens, and the answer " x" has an x itself; " y" leaves 18
    free = TaskBatches([Example("1", "x" * 50, answer=" y")], BYTES, FREE, 20, 1, 0, "x").batch(0, 1)
    assert bytes(row(free, 0)[0][:15]) == b"x" * 13 + b" y"
    asked = Task("t", (), (), choices, choices, choices, "{text}", "multiple_choice", choices=("A", "B"))
    lengths = {
        int(b.examples[0]): b.batch.tokens.shape[1] for b in question_batches(list(asked.asked(choices)), BYTES, 20)
    }
    assert lengths == {0: 15, 1: 18}
    with pytest.raises(UserError, match=r"max_new_tokens=7: the answer of example 9 has 9 tokens; use at least 9"):
        TaskBatches([Example("9", "q", answer=" too long")], BYTES, FREE, 64, 1, 0, "x")


def test_answers_with_the_same_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="the answers ' no' and ' no' have the same tokens"):
        scored_tokens([" no", " yes", " no"], BYTES)
