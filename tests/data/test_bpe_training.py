"""The training of a BPE against the library alone, on long words, and under interruptions and failures."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from bpe import trained_by_the_library
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from sparsetrain.data import bpe_training
from sparsetrain.data.bpe_training import LONGEST_WORD, bounded, byte_level
from sparsetrain.data.tokenizer import END_OF_TEXT, Tokenizer
from sparsetrain.errors import UserError

PROSE = [
    f"The {word} sat on the mat; https://a.org/{word * 9} and {'=' * 90} of {word}s." for word in ("cat", "dog")
] * 9
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)


def by_the_library_alone(texts: list[str], vocab_size: int) -> str:
    """Return the file that the library writes when it trains on the texts directly."""
    return str(trained_by_the_library(byte_level(models.BPE()), texts, vocab_size).to_str(pretty=True))


def words(texts: list[str]) -> list[str]:
    """Return the words into which the library's pre-tokenizer cuts texts."""
    return [text[start:end] for text in texts for _, (start, end) in WORDS.pre_tokenize_str(text)]


def test_ordinary_text_gives_the_library_s_file_byte_for_byte() -> None:
    """A word of 256 characters is not cut, nor is a run of 256 blanks."""
    texts = [*PROSE, "x" * LONGEST_WORD + " " * LONGEST_WORD + "y"]
    assert list(bounded(texts)) == texts
    assert bpe_training.train(texts, 400, END_OF_TEXT).decode() == by_the_library_alone(texts, 400)


def test_long_words_are_trained_on_in_pieces() -> None:
    """The vocabulary is the one that the library learns from the pieces."""
    protein = "".join(random.Random(0).choices("ACDEFGHIKLMNPQRSTVWY", k=2000))
    pieces = [protein[start : start + LONGEST_WORD] for start in range(0, len(protein), LONGEST_WORD)]
    trained = Tokenizer.train([protein, *PROSE], 500)
    assert trained.sha256 == Tokenizer(by_the_library_alone([*pieces, *PROSE], 500).encode()).sha256
    assert trained.decode(trained.encode(protein)) == protein


runs = st.sampled_from(["a", "é", "日", " ", "\n", "\u3000", "1", "'", "'s", "-", "😀", "\u0301", "½"])
long_texts = st.lists(st.tuples(runs, st.integers(1, 3) | st.integers(250, 600)), max_size=8).map(
    lambda parts: "".join(run * count for run, count in parts)
)


@given(long_texts)
def test_only_words_longer_than_the_limit_are_cut(text: str) -> None:
    """The trainer sees the same words, except that long words come in pieces; no character is lost."""
    pieces = list(bounded([text]))
    expected = words([text])
    if pieces != [text]:
        starts = [(word, start) for word in expected for start in range(0, len(word), LONGEST_WORD)]
        expected = [word[start : start + LONGEST_WORD] for word, start in starts]
    assert "".join(pieces) == text
    assert words(pieces) == expected
    assert max(map(len, expected), default=0) <= LONGEST_WORD + 1  # with the blank before it


def test_a_signal_ends_the_training_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library handles no signal, so the training process is killed when the waiting process is interrupted."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        return started[0]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", start)
    letters = "".join(random.Random(0).choices("ACDEFGHIKLMNPQRSTVWY", k=2_000_000))
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            Tokenizer.train([letters], 50_000)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - begun < 5
    assert started[0].poll() == -signal.SIGKILL


def test_a_text_that_cannot_be_read_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the source is raised, and the training process ends."""

    def texts() -> Any:
        yield "one"
        raise UserError("line 2 is damaged")

    with pytest.raises(UserError, match="line 2 is damaged"):
        Tokenizer.train(texts(), 300)


def test_a_training_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is the last line that the process wrote, or its status."""
    monkeypatch.setattr(bpe_training, "__file__", "no_such_script.py")
    with pytest.raises(UserError, match=r"data\.tokenizer=bpe: the training of the tokenizer failed: .*no_such_script"):
        Tokenizer.train(["text " * 100_000] * 3, 300)


def test_a_cut_input_trains_on_nothing() -> None:
    """If the process that reads the corpus is killed, the training process ends too."""
    frames = (3).to_bytes(8, "little") + b"abc"
    command = [sys.executable, "-P", bpe_training.__file__, "300", END_OF_TEXT]
    done = subprocess.run(command, input=frames, capture_output=True, check=False)
    assert done.returncode != 0
    assert done.stdout == b""
    assert b"has ended" in done.stderr
