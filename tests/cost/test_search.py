"""Many configurations at once against `simulate`, one after the other, and the Pareto set against all pairs."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st_
from hypothesis.extra.numpy import arrays

import sparsetrain as st
from sparsetrain.cost.cluster.memory import cluster_memory
from sparsetrain.cost.cluster.parallelism import Parallelism
from sparsetrain.cost.hardware import Machine
from sparsetrain.cost.search import DIVISIONS, Array, Candidates, pareto, predict, rounded
from sparsetrain.cost.simulate import simulate
from sparsetrain.cost.sizes import Sizes
from sparsetrain.cost.step_memory import step_memory
from sparsetrain.cost.timing import Setting, counted_layers

CONTEXT, VOCABULARY = 256, 8192


def drawn(count: int, devices: list[float], seed: int = 0, kv: int = 1) -> Candidates:
    """Return random configurations with heads of 64 features, ``kv`` of which share keys and values."""
    generator = np.random.default_rng(seed)
    heads = kv * generator.integers(1, 24 // kv, count).astype(float)
    width, layers = 64.0 * heads, generator.integers(1, 24, count).astype(float)
    sizes = Sizes(width, layers, heads, width / kv, 4.0 * width, float(VOCABULARY))
    number = generator.choice(np.array(devices), count)
    density = generator.choice(np.array([1.0, 0.5, 0.25, 0.1]), count)
    return Candidates(sizes, density, float(CONTEXT), number * 2.0 ** generator.integers(0, 7, count), number)


def config_of(candidates: Candidates, index: int, kv: int = 1) -> st.ModelConfig:
    width, layers = (int(getattr(candidates.sizes, name)[index]) for name in ("width", "layers"))
    heads = width // 64
    return st.ModelConfig(width, layers, heads, VOCABULARY, n_kv_heads=heads // kv, sparsity=0.0)


@pytest.mark.parametrize(
    ("name", "devices", "dtype", "kv"),
    [
        ("h100", [1.0, 8.0], "bfloat16", 1),
        ("h100", [8.0, 16.0], "float32", 2),
        ("cs3", [1.0, 4.0], "bfloat16", 1),
        ("emerald_rapids", [1.0], "float32", 1),
    ],
)
def test_the_search_says_what_simulate_says(name: str, devices: list[float], dtype: str, kv: int) -> None:
    machine, candidates = Machine.load(name), drawn(400, devices, kv=kv)
    found = predict(candidates, machine, Setting(dtype, threads=1))
    assert found.fits.sum() > 100
    assert np.isinf(found.seconds[~found.fits]).all()
    for index in np.random.default_rng(1).choice(np.flatnonzero(found.fits), 25, replace=False):
        config, micro = config_of(candidates, index, kv), int(found.micro_batch[index])
        number, batch = int(candidates.devices[index]), int(candidates.batch[index])
        density = float(candidates.density[index])
        alone = number == 1 and dtype == "float32"
        parallelism = DIVISIONS[found.division[index]].parallelism(float(number), float(micro))
        said = simulate(
            config,
            machine,
            CONTEXT,
            micro if alone else batch,  # for one device `simulate` has no micro-batches
            density=density,
            dtype=dtype,
            threads=1,
            parallelism=parallelism,
        )
        expected = said.seconds
        if alone:  # the optimizer takes its step once
            launch = 0.0 if machine.launch is None else machine.launch.value
            passes = batch / micro
            expected = passes * said.seconds - (passes - 1.0) * (said.terms["optimizer"] + launch)
        assert found.seconds[index] == pytest.approx(expected, rel=1e-9)
        flops = st.flops(config, CONTEXT, batch, density=density).total
        assert candidates.flops[index] == pytest.approx(flops, rel=1e-12)
        if alone:
            memory = step_memory(config, CONTEXT, micro, density=density, threads=1).peak
            assert found.memory[index] == pytest.approx(memory, abs=1.0)
        elif machine.execution == "resident":
            assert found.memory[index] == pytest.approx(said.peak_memory, abs=1.0)


def test_micro_batches_are_as_large_as_memory_allows() -> None:
    machine, candidates = Machine.load("h100"), drawn(2000, [1.0])
    candidates = replace(candidates, batch=candidates.batch * 64.0)
    setting = Setting("bfloat16")
    found = predict(candidates, machine, setting)
    several = np.flatnonzero(found.fits & (found.micro_batch < candidates.batch))
    assert len(several) > 20
    for index in several[:20]:
        one, twice = candidates.part(np.array([index])), 2.0 * found.micro_batch[index]
        held = found.memory[index]
        assert held <= found.room
        more = memory_with(one, twice, setting)
        assert more > found.room


def memory_with(one: Candidates, micro: float, setting: Setting) -> float:
    divided = Parallelism(micro_batch=micro)
    layers = counted_layers(one.layers, Machine.load("h100"), setting)  # which cannot use zeros
    found = cluster_memory(one.sizes, one.context, one.batch, divided, setting, layers)
    return float(np.asarray(found.total)[0])


def test_what_does_not_fit_one_replica_is_shared_by_all() -> None:
    width = np.array([8192.0])
    sizes = Sizes(width, np.array([32.0]), width / 128.0, width, 4.0 * width, 32000.0)
    for devices, division in ((1.0, -1), (64.0, 2)):
        one = Candidates(sizes, np.ones(1), 2048.0, np.array([64.0]), np.array([devices]))
        found = predict(one, Machine.load("h100"), Setting("bfloat16"))
        assert found.division[0] == division
        assert found.fits[0] == (division >= 0)


@settings(max_examples=30, deadline=None)
@given(st_.integers(0, 10_000), st_.sampled_from(["h100", "cs3"]), st_.sampled_from(["layers", "batch", "density"]))
def test_more_of_anything_never_takes_fewer_flops(seed: int, name: str, more: str) -> None:
    one = drawn(20, [1.0], seed)
    if more == "layers":
        other = replace(one, sizes=replace(one.sizes, layers=one.sizes.layers + 1.0))
    elif more == "batch":
        other = replace(one, batch=one.batch * 2.0)
    else:
        other = replace(one, density=np.minimum(1.0, one.density * 1.5))
    assert (other.flops >= one.flops).all()
    machine, setting = Machine.load(name), Setting("bfloat16")
    first, second = predict(one, machine, setting), predict(other, machine, setting)
    both = first.fits & second.fits & (first.micro_batch == second.micro_batch)
    if more != "batch":
        assert (second.seconds[both] >= first.seconds[both] * (1.0 - 1e-12)).all()


def test_a_core_searches_more_than_twenty_thousand_a_second() -> None:
    """Measured alone on a core it is above 1e5; the bound leaves room for a busy machine."""
    candidates, machine, setting = drawn(32_768, [1.0, 8.0]), Machine.load("h100"), Setting("bfloat16")
    predict(candidates.part(slice(0, 16_384)), machine, setting)
    begin = time.process_time()
    predict(candidates, machine, setting)
    assert len(candidates) / (time.process_time() - begin) > 2e4


def brute(rows: Array) -> list[bool]:
    known = np.where(np.isnan(rows), 0.0, rows)
    kept = [bool(np.isfinite(row).all()) for row in known]
    for i, row in enumerate(known):
        for j, other in enumerate(known):
            alike = np.isnan(rows[i, 2]) == np.isnan(rows[j, 2]) and np.isfinite(other).all()
            if alike and (other <= row).all() and (other < row).any():
                kept[i] = False
    return kept


COARSE = st_.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, np.inf])


@settings(max_examples=150, deadline=None)
@given(arrays(float, st_.tuples(st_.integers(0, 25), st_.just(3)), elements=COARSE), st_.booleans())
def test_the_pareto_set_is_that_of_all_pairs(rows: Array, unknown: bool) -> None:
    if unknown:
        rows[::2, 2] = np.nan
    assert pareto(rows).tolist() == brute(rows)


def test_the_pareto_set_of_many_is_that_of_all_pairs() -> None:
    rows = np.random.default_rng(0).lognormal(size=(300, 3))
    assert pareto(rows).tolist() == brute(rows)


def test_rounding_errors_beat_nothing() -> None:
    rows = np.array([[1.0, 2.0, 3.0], [1.0 + 1e-13, 2.0 - 1e-13, 3.0]])
    assert pareto(rows).tolist() == [True, True]
    assert (rounded(np.array([0.0, 1234567891.2, np.inf])) == [0.0, 1234567890.0, np.inf]).all()
