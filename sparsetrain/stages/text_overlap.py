"""Whether the text of a task's test rows stands in the text that the weights of a run have seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparsetrain.data import Corpora, DataConfig, Task, find_corpora
from sparsetrain.data.tasks.text_overlap import WINDOW, repeated_rows
from sparsetrain.errors import UserError
from sparsetrain.runs.origin import Origin

MOST_BYTES = 64 << 20  # of training text that is read
_TOKENS, _SHARED = 1 << 20, 256  # tokens of a piece, and how many it shares with the one before it

_known: dict[tuple[str, str], dict[str, Any]] = {}
"""What was found for the text and the task that were asked for last, which the arms of a pipeline share."""


def text_overlap(task: Task, data: DataConfig, origin: Origin) -> dict[str, Any]:
    """Return the entry ``overlap_text`` of a result, or nothing for a task whose examples do not have their own text.

    Args:
        task: the task.
        data: the text of the run, which is read again if its corpus is in the cache and has at most 64 MiB.
        origin: the origin of the run.
    """
    if not any(example.text for example in task.test):
        return {}
    key = (origin.corpus, task.fingerprint())
    if key not in _known:
        _known.clear()
        _known[key] = _compared(task, data, origin)
    return {"overlap_text": _known[key]}


def _compared(task: Task, data: DataConfig, origin: Origin) -> dict[str, Any]:
    corpora = _corpora(data, origin)
    if corpora is None:
        return {"rows": None, "why": "the training text is not in the cache"}
    size = sum(corpus.manifest["splits"]["train"]["bytes"] for corpus in corpora.values())
    if size > MOST_BYTES:
        return {"rows": None, "why": f"the training text has more than {MOST_BYTES >> 20} MiB"}
    rows, compared = repeated_rows([example.text for example in task.test], _pieces(corpora))
    return {"rows": rows, "compared": compared, "words": WINDOW}


def _corpora(data: DataConfig, origin: Origin) -> Corpora | None:
    try:
        key, corpora = find_corpora(data)
    except UserError:  # its source is gone
        return None
    return corpora if key == origin.corpus else None


def _pieces(corpora: Corpora) -> Iterator[str]:
    for corpus in corpora.values():
        for start in range(0, len(corpus.train), _TOKENS):
            first = max(0, start - _SHARED)
            tokens = corpus.train.window(first, min(start + _TOKENS, len(corpus.train)) - first)
            # A document ends where the text of its end token stands, so that no window reaches into the next one.
            yield corpus.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
