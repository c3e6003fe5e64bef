"""Fill in the middle: a part of a document moves to its end, so that a model learns to fill a gap.

A left-to-right model learns this from the order of its training text alone (arXiv 2207.14255). Three sentinel tokens
mark the parts. `Tokenizer.with_sentinels` has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch

from sparsetrain.errors import UserError
from sparsetrain.seeds import derive_seed

# No vocabulary has these ids, so they cannot be confused with tokens, and an embedding refuses them.
PLACEHOLDERS = (-1, -2, -3)

Sentinels = tuple[int, int, int]


def check_rate(name: str, value: float) -> None:
    """Raise `UserError` unless ``value`` is in [0, 1]; the line begins with ``name``."""
    if not 0.0 <= value <= 1.0:
        raise UserError(f"{name}={value} is outside [0, 1]")


@overload
def fill_in_the_middle(
    ids: Sequence[int], rate: float, spm_rate: float, seed: int, *, sentinels: Sentinels = PLACEHOLDERS
) -> list[int]: ...


@overload
def fill_in_the_middle(
    ids: np.ndarray[Any, Any], rate: float, spm_rate: float, seed: int, *, sentinels: Sentinels = PLACEHOLDERS
) -> np.ndarray[Any, Any]: ...


@overload
def fill_in_the_middle(
    ids: torch.Tensor, rate: float, spm_rate: float, seed: int, *, sentinels: Sentinels = PLACEHOLDERS
) -> torch.Tensor: ...


def fill_in_the_middle(
    ids: Any, rate: float, spm_rate: float, seed: int, *, sentinels: Sentinels = PLACEHOLDERS
) -> Any:
    """Return the ids of a document with its middle moved to the end, or the document as it is.

    Two places cut the document into a prefix, a middle and a suffix. They are drawn uniformly from the borders between
    tokens and the two ends, so that a part may be empty. The split is on the level of tokens: it never cuts one. With
    sentinels P, M and S, the two orders are those of arXiv 2207.14255:

    - PSM: ``P prefix S suffix M middle``
    - SPM: ``P S suffix M prefix middle``, variant 2 of its Appendix D, which places the sentinels as PSM does

    The result is a function of the arguments alone. A higher ``rate`` transforms the documents of a lower one and
    more, with the same cuts. Call the function once per document, before documents are packed, so that no part comes
    from another document; ``seed`` should then depend on the document. ``data.fim_rate`` does so for a corpus.

    ```python
    tokenizer = Tokenizer.bytes().with_sentinels()
    ids = tokenizer.encode("def double(x):\\n    return 2 * x\\n")
    st.fill_in_the_middle(ids, 1.0, 0.5, seed=7, sentinels=tokenizer.sentinels)
    ```

    Args:
        ids: the ids of one document [n], without a token for its end: a list, an array or a tensor.
        rate: probability that the document is transformed.
        spm_rate: probability that a transformed document has the order SPM, else PSM.
        seed: of the draws, any whole number.
        sentinels: the ids of prefix, middle and suffix. The default are placeholders, which no vocabulary has.

    Returns:
        The ids [n + 3] if the document is transformed, else [n]; an empty document stays empty. A list or another
        sequence gives a list. An array or a tensor keeps its type, except that int64 replaces a type which cannot hold
        the sentinels.

    Raises:
        UserError: a rate is outside [0, 1], ``ids`` is not a row of whole numbers, or the sentinels are not three
            different ids that ``ids`` is free of.
    """
    check_rate("rate", rate)
    check_rate("spm_rate", spm_rate)
    held: Any = torch.as_tensor(ids) if isinstance(ids, torch.Tensor) else np.asarray(ids)
    if held.ndim != 1:
        raise UserError(f"ids has the shape {list(held.shape)}; it must be the ids of one document, with one dimension")
    if len(held) > 0 and not (held.dtype.kind in "iu" if isinstance(held, np.ndarray) else _is_whole(held)):
        raise UserError(f"ids holds {str(held.dtype).removeprefix('torch.')}; ids are whole numbers")
    if len(sentinels) != 3 or len(set(sentinels)) != 3:
        raise UserError(f"sentinels={sentinels} must be the three different ids of prefix, middle and suffix")
    random = np.random.default_rng(derive_seed(seed, "fill in the middle"))
    # All draws are made in any case, so that neither rate changes the cuts.
    chosen, spm = random.random() < rate, random.random() < spm_rate
    first, second = sorted(random.integers(0, len(held) + 1, size=2).tolist())
    if not chosen or len(held) == 0:
        return ids if isinstance(ids, np.ndarray | torch.Tensor) else list(ids)
    if present := [mark for mark in sentinels if bool((held == mark).any())]:
        raise UserError(f"the document contains the sentinel {present[0]}, so its parts could not be told apart")
    prefix, middle, suffix = held[:first], held[first:second], held[second:]
    before, inner, after = sentinels
    parts = [[before], [after], suffix, [inner], prefix, middle]
    if not spm:
        parts = [[before], prefix, [after], suffix, [inner], middle]
    if isinstance(held, torch.Tensor):
        kind = _kind(held.dtype, torch.iinfo(held.dtype), sentinels, torch.int64)
        return torch.cat([torch.as_tensor(part, dtype=kind, device=held.device) for part in parts])
    kind = _kind(held.dtype, np.iinfo(held.dtype), sentinels, np.dtype(np.int64))
    joined = np.concatenate([np.asarray(part, dtype=kind) for part in parts])
    return joined if isinstance(ids, np.ndarray) else joined.tolist()


def _is_whole(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _kind(dtype: Any, limits: Any, sentinels: Sentinels, wide: Any) -> Any:
    """Return ``dtype`` if it holds the sentinels, else ``wide``."""
    return dtype if limits.min <= min(sentinels) and max(sentinels) <= limits.max else wide
