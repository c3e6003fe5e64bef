"""Byte-level BPE, trained by the `tokenizers` library in a process of its own.

The library handles no signal while it trains, so `train` runs it as a script (``python bpe_training.py VOCABULARY
END_OF_TEXT``), which can be killed at any time. The script imports only the standard library and `tokenizers`, so that
it starts at once. Its input has one frame per text: the length in bytes (8 bytes, little-endian), then the text as
UTF-8. A length of `_END` marks the end of the input. Its output is a ``tokenizer.json``.
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

# The trainer takes time quadratic in the length of a word, so it sees a longer word (a protein, a text without spaces)
# in pieces of this many characters. Encoding takes nearly linear time and does not cut words.
LONGEST_WORD = 256
_END = 2**64 - 1
# Matches a text in which no run of white space or of other characters is longer than LONGEST_WORD.
_SHORT_RUNS = re.compile(rf"(?:\S{{1,{LONGEST_WORD}}}+(?!\S)|\s{{1,{LONGEST_WORD}}}+(?!\s))*+")
_BLOCK = 1 << 20  # characters per call of the pre-tokenizer


def byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """Return a tokenizer with byte symbols and the word pattern of GPT-2."""
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def bounded(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts with the same words as ``texts``, except that words longer than `LONGEST_WORD` come in pieces.

    A text without a long run of characters is yielded unchanged. Any other text is yielded word by word; the
    pre-tokenizer reads each of these short texts as the same word again.
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
    """Return the ``tokenizer.json`` of a BPE with at most ``vocab_size`` tokens; equal texts give equal results."""
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
    """The training process failed; the message gives the reason."""


def train(texts: Iterable[str], vocab_size: int, end_of_text: str) -> bytes:
    """Call `trained` in a process of its own and return the bytes of the ``tokenizer.json``.

    The process ends with this function, also when a signal interrupts it.

    Raises:
        TrainingFailedError: the process failed; the message is its last line of stderr, or its exit status.
    """
    command = [sys.executable, "-P", __file__, str(vocab_size), end_of_text]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # the process ended early; its status and message are read below
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
                with contextlib.suppress(BrokenPipeError):  # closing flushes the buffer, and the reader is gone
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes, and the parent kills this one
    result = trained(_frames(sys.stdin.buffer), int(vocab_size), end_of_text)
    sys.stdout.buffer.write(result.encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
