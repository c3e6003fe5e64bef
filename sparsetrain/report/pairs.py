"""Which arms of a pipeline are compared: choices at equal sparsity, and sparsities at an equal choice.

The name of an arm joins the choices that make it, as in ``sparse-0.75_two_phase``. Its sparsity is the part ``dense``
or ``sparse-S``, and its choice is the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparsetrain.errors import UserError, nearest

_SPARSITY = re.compile(r"(?:^|_)(?:dense|sparse-([0-9][0-9.]*(?:e-?[0-9]+)?))(?=_|$)")


def divided(arm: str) -> tuple[float | None, str]:
    """Return the sparsity in the name of an arm, None if it names none, and its choice; empty for a sparsity alone."""
    found = _SPARSITY.search(arm)
    if found is None:
        return None, arm
    return float(found[1] or 0.0), (arm[: found.start()] + arm[found.end() :]).removeprefix("_")


def comparisons(arms: Sequence[str], sparsity: Mapping[str, float], base: str | None = None) -> list[tuple[str, str]]:
    """Return the pairs of an arm and the arm that it is compared with.

    Each arm is compared with the first arm of its sparsity, and with the first arm of its choice, which is the least
    sparse. An arm that has neither is compared with the first of all. With ``base``, every arm is compared with it.

    Args:
        arms: in order of sparsity.
        sparsity: of each arm; it counts where the name has none.
        base: an arm; there is no pair if it is not in ``arms``.
    """
    if base is not None:
        return [(arm, base) for arm in arms if arm != base and base in arms]
    own, choice = {}, {}
    for arm in arms:
        named, choice[arm] = divided(arm)
        own[arm] = sparsity[arm] if named is None else named
    pairs = []
    for arm in arms:
        same = next(other for other in arms if own[other] == own[arm])
        alike = next(other for other in arms if choice[other] == choice[arm])
        others = list(dict.fromkeys(other for other in (same, alike) if other != arm))
        pairs += [(arm, other) for other in others or arms[:1] if other != arm]
    return pairs


def check_base(base: str | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise `UserError` if a base is no arm of a table."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    if base is not None and base not in arms:
        raise UserError(f"--base={base} is no arm{nearest(base, arms)}; there are {', '.join(arms)}")
