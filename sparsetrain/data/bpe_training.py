"""Byte-level BPE, trained by the `tokenizers` library in a process of its own.

The library holds the processor for as long as it trains and hears no signal, so `train` runs it as a script
(``python bpe_training.py VOCABULARY``), which can be ended at any time. The script imports nothing but the standard
library and `tokenizers`, so that it starts at once. Its input is a frame per text: 8 bytes of length, little-endian,
and that many bytes of UTF-8; a length of `_END` says that all have come. Its output is a ``tokenizer.json``.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import IO

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

# The trainer takes time quadratic in the length of a word. A longer one (a protein, a text without spaces) is trained
# on in pieces of this many characters. Only training cuts it: encoding takes it whole, in nearly linear time.
LONGEST_WORD = 256
_END = 2**64 - 1
# Runs of what is white space and of what is not, none of them longer than a word may be.
_SHORT_RUNS = re.compile(rf"(?:\S{{1,{LONGEST_WORD}}}+(?!\S)|\s{{1,{LONGEST_WORD}}}+(?!\s))*+")
_BLOCK = 1 << 20  # characters that are looked at together


def byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """Return a tokenizer whose symbols are bytes and whose words are those of GPT-2."""
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def bounded(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts with the words of ``texts``, but for longer ones than `LONGEST_WORD`, which come in pieces.

    A text without such a run of characters comes as it is. Each word of another one comes as a text of its own, which
    the pre-tokenizer takes for that word again.
    """
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in texts:
        if _SHORT_RUNS.fullmatch(text):
            yield text
            continue
        for first in range(0, len(text), _BLOCK):
            block = text[first : first + _BLOCK]
            for _, (start, end) in words.pre_tokenize_str(block):
                for place in range(start, end, LONGEST_WORD):
                    yield block[place : min(place + LONGEST_WORD, end)]


def trained(texts: Iterable[str], vocab_size: int, end_of_text: str) -> str:
    """Return the ``tokenizer.json`` of at most ``vocab_size`` tokens that these texts give, always the same."""
    inner = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[end_of_text],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(bounded(texts), trainer=trainer)
    return str(inner.to_str(pretty=True))


class TrainingFailedError(Exception):
    """Why the process that trains gave no tokenizer."""


def train(texts: Iterable[str], vocab_size: int, end_of_text: str) -> bytes:
    """Return what `trained` does, from a process that ends when this function does, also by a signal.

    Raises:
        TrainingFailedError: the process failed; the message is its last line, or its status.
    """
    command = [sys.executable, "-P", __file__, str(vocab_size), end_of_text]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # it has ended early; its status and its message say why
            for text in texts:
                content = text.encode()
                process.stdin.write(len(content).to_bytes(8, "little") + content)
            process.stdin.write(_END.to_bytes(8, "little"))
        output, message = process.communicate()
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what was still in its buffer has no reader any more
                    stream.close()
    if process.returncode != 0:
        lines = message.decode(errors="replace").strip().splitlines()
        raise TrainingFailedError(lines[-1] if lines else f"it ended with status {process.returncode}")
    return output


def _frames(stream: IO[bytes]) -> Iterator[str]:
    while (length := int.from_bytes(_exactly(stream, 8), "little")) != _END:
        yield _exactly(stream, length).decode()


def _exactly(stream: IO[bytes], count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise EOFError("the process that reads the corpus has ended")
    return content


def main(vocab_size: str, end_of_text: str) -> None:
    """Train on the texts of the standard input, and write the tokenizer to the standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the one that waits ends this one
    result = trained(_frames(sys.stdin.buffer), int(vocab_size), end_of_text)
    sys.stdout.buffer.write(result.encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
