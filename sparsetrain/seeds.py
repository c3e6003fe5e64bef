"""Seeds derived from names, so that they do not depend on the order in which things are built.

Masks, initial values and samples are functions of a named seed. A resumed run, a run on other hardware and a run with
one more layer therefore draw the same numbers for the same name.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *names: object) -> int:
    """Return a 63-bit seed for the purpose ``names``, e.g. ``derive_seed(0, "mask", "blocks.3.attn.qkv")``."""
    text = "\x1f".join([str(int(seed)), *(str(name) for name in names)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """Return a CPU generator seeded by `derive_seed`; its draws do not depend on the device of the model."""
    return torch.Generator("cpu").manual_seed(derive_seed(seed, *names))


def resolve_seed(seed: int | None) -> int:
    """Return ``seed``, or a seed drawn from torch's global generator if it is None."""
    if seed is not None:
        return seed
    return int(torch.randint(0, 2**62, (), dtype=torch.int64, device="cpu").item())
