"""Seeds that depend on what they are for, not on the order in which things are built.

Masks, initial values and samples are functions of a named seed, so that a resumed run, a run on other hardware and
a run with one layer more draw the same numbers for the same thing.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *names: object) -> int:
    """Return a 63-bit seed for the thing called ``names``, e.g. ``derive_seed(0, "mask", "blocks.3.attn.qkv")``."""
    text = "\x1f".join([str(int(seed)), *(str(name) for name in names)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """Return a CPU generator seeded by `derive_seed`; draws made on the CPU do not depend on the device."""
    return torch.Generator("cpu").manual_seed(derive_seed(seed, *names))


def resolve_seed(seed: int | None) -> int:
    """Return ``seed``, or one drawn from torch's global generator when it is None."""
    if seed is not None:
        return seed
    return int(torch.randint(0, 2**62, (), dtype=torch.int64, device="cpu").item())
