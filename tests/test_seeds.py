"""Named seeds are constant, differ by name, and do not depend on the default device."""

from __future__ import annotations

import hashlib
import itertools

import torch

from sparsetrain.seeds import derive_seed, generator, resolve_seed


def test_derive_seed_matches_hashlib() -> None:
    digest = hashlib.blake2b(b"7\x1fmask\x1fblocks.0.attn.qkv", digest_size=8).digest()
    assert derive_seed(7, "mask", "blocks.0.attn.qkv") == int.from_bytes(digest, "little") >> 1


def test_seeds_stay_what_they_were() -> None:
    # A change of these values would redraw all masks and initial values of all saved runs.
    assert derive_seed(0, "mask", "blocks.0.attn.qkv") == 4563205040520298762


def test_names_and_seeds_are_told_apart() -> None:
    calls = [(0, "a", "b"), (0, "ab"), (0, "b", "a"), (1, "a", "b"), (0, "a", 1), (0, "a", 11), (0,), (-1,)]
    found = [derive_seed(*call) for call in calls]  # type: ignore[arg-type]
    assert all(a != b for a, b in itertools.combinations(found, 2))
    assert all(0 <= seed < 2**63 for seed in found)


def test_generator_is_on_the_cpu_whatever_the_default_device() -> None:
    expected = torch.rand(3, generator=generator(0, "x"))
    with torch.device("meta"):
        source = generator(0, "x")
    assert source.device.type == "cpu"
    assert torch.equal(torch.rand(3, generator=source), expected)


def test_resolve_seed_keeps_one_and_draws_from_the_global_generator() -> None:
    assert resolve_seed(0) == 0
    torch.manual_seed(1)
    first, second = resolve_seed(None), resolve_seed(None)
    assert first != second
    torch.manual_seed(1)
    with torch.device("meta"):
        assert resolve_seed(None) == first
