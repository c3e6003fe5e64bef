"""A machine's file from measured times: curves that reproduce them, and factors that whole steps determine."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from sparsetrain.cost import operations as ops
from sparsetrain.cost.calibrated import GROUPS, Sample, Step, corrected, document, group_of
from sparsetrain.cost.hardware import Machine
from sparsetrain.cost.operations import Operation, step_operations
from sparsetrain.cost.sizes import Layers, Sizes
from sparsetrain.cost.timing import Setting, operation_terms, step_terms
from sparsetrain.errors import UserError

RATE, BANDWIDTH = 1e11, 2e10
THREADS = (1, 2)


def sizes_of(width: float, **changes: Any) -> Sizes:
    base = {"layers": 1.0, "heads": 4.0, "kv_width": width, "ffn": 4.0 * width, "vocabulary": 512.0}
    return Sizes(**{"width": width, **base, **changes})


def seconds_of(operation: Operation, implementation: str, threads: int) -> float:
    """Return the seconds of an imagined machine: a fixed cost of a call, a rate, and slower work on few nonzeros."""
    if operation.kind in ops.PRODUCTS:
        whole = implementation in ("dense", "masked")
        flops = float(operation.dense_flops if whole else operation.flops)
        slow = 1.0 if whole else float(operation.sizes["density"]) ** -0.3
        return 2e-5 + slow * flops / (RATE * threads**0.8)
    return 1e-5 + float(operation.bytes) / (BANDWIDTH * threads**0.5)


def samples() -> list[Sample]:
    found = []
    for width, tokens, threads in itertools.product((32.0, 128.0, 512.0), (64.0, 256.0, 2048.0), THREADS):
        dense = [each for each in step_operations(sizes_of(width), tokens, 1.0) if each.module.endswith("attn.out")]
        found += [Sample(each, "dense", threads, seconds_of(each, "dense", threads)) for each in dense]
        for density, name in itertools.product((0.1, 0.5), ("csr", "masked")):
            layers = [Layers(1.0, {"attn.out": density})]
            for each in step_operations(sizes_of(width), tokens, 1.0, layers):
                if each.module.endswith("attn.out"):
                    found.append(Sample(each, name, threads, seconds_of(each, name, threads)))
    kinds = (ops.NORM, ops.GELU, ops.ADD, ops.EMBEDDING, ops.OPTIMIZER, ops.ATTENTION, ops.HEAD)
    for threads in THREADS:
        seen: dict[tuple[str, str, tuple[float, ...]], Sample] = {}
        for context, width in itertools.product((32.0, 256.0), (64.0, 256.0)):
            for each in step_operations(sizes_of(width, heads=width / 16.0), context, 2.0):
                kind = each.curve or each.kind
                names = {ops.ATTENTION: ("context", "d_head"), ops.HEAD: ("vocabulary", "features", "tokens")}
                if kind in kinds:
                    place = tuple(float(each.sizes[name]) for name in names.get(kind, ("elements",)))
                    sample = Sample(each, "dense", threads, seconds_of(each, "dense", threads))
                    seen.setdefault((kind, each.phase, place), sample)
        found += seen.values()
    return found


def content() -> dict[str, Any]:
    return document(samples(), "imagined", "a test", "2026-01-01", 2**34, BANDWIDTH)


def test_the_curves_reproduce_what_was_measured() -> None:
    machine = Machine.from_document(content(), "this", "a test")
    for sample in samples():
        setting = Setting(backend=sample.implementation, threads=sample.threads)
        if sample.implementation == "dense":
            setting = Setting(threads=sample.threads)
        predicted = sum(float(value) for value in operation_terms(sample.operation, machine, setting).values())
        assert predicted == pytest.approx(sample.seconds, rel=1e-5), sample.key  # the file has six digits


def test_whole_steps_determine_factors_and_the_time_of_a_call() -> None:
    machine = Machine.from_document(content(), "this", "a test")
    true = {1: (1.2, 1.4, 0.9, 1.1, 1.8), 2: (1.1, 1.6, 1.0, 1.3, 1.5)}
    steps = []
    generator = np.random.default_rng(0)
    for number in range(60):
        width, layers = float(generator.choice([48, 96, 192, 384])), float(generator.integers(1, 8))
        sparse = number % 3 > 0
        density = dict.fromkeys(("attn.qkv", "attn.out", "mlp.up", "mlp.down"), 0.2) if sparse else {}
        sizes = sizes_of(width, layers=layers, heads=width / 16.0)
        operations = step_operations(
            sizes, float(generator.choice([48, 96])), float(generator.choice([2, 8])), [Layers(layers, density)]
        )
        setting = Setting(backend="csr" if sparse else "auto", threads=THREADS[number % 2])
        seconds = 0.0
        for each in operations:
            if each.kind not in machine.included:
                alone = sum(float(value) for value in operation_terms(each, machine, setting).values())
                factor = true[setting.threads][group_of(each)]
                seconds += float(each.count) * (factor * alone + 4e-5)
        steps.append(Step(operations, setting, seconds))
    better = Machine.from_document(corrected(content(), steps), "this", "a test")
    assert better.launch is not None
    assert better.launch.value == pytest.approx(4e-5, rel=0.15)
    assert better.spread is not None
    assert better.spread.value == pytest.approx(0.05, abs=0.003)  # that of the machine's own speed
    errors = [abs(float(step_terms(s.operations, better, s.setting).total) / s.seconds - 1.0) for s in steps]
    assert max(errors) < 0.02
    assert len(GROUPS) == len(true[1])


def test_an_incomplete_grid_is_refused() -> None:
    kept = samples()
    first = next(index for index, each in enumerate(kept) if each.key == "linear.csr.forward")
    with pytest.raises(UserError, match=r"the calibration of linear.csr.forward lacks 1 of \d+ places"):
        document(kept[:first] + kept[first + 1 :], "x", "y", "z", 2**30, 1e9)


def test_time_never_falls_with_noise() -> None:
    generator = np.random.default_rng(1)
    noisy = [
        Sample(s.operation, s.implementation, s.threads, s.seconds * generator.uniform(0.7, 1.4)) for s in samples()
    ]
    machine = Machine.from_document(document(noisy, "x", "y", "z", 2**34, BANDWIDTH), "this", "a test")
    widths, setting = np.geomspace(16.0, 2000.0, 60), Setting(threads=1)

    def total(width: Any = 128.0, tokens: Any = 100.0, density: Any = 0.3, layers: Any = 2.0) -> Any:
        sizes = sizes_of(width, layers=layers, heads=8.0)
        names = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
        groups = [Layers(layers, dict.fromkeys(names, density))]
        return np.asarray(step_terms(step_operations(sizes, tokens, 1.0, groups), machine, setting).total)

    for name, values in (
        ("width", widths),
        ("tokens", np.geomspace(8.0, 5000.0, 60)),
        ("density", np.linspace(0.01, 0.99, 60)),
        ("layers", np.arange(1.0, 30.0)),
    ):
        seconds = total(**{name: values})
        assert (np.diff(seconds) >= -1e-12 * seconds[1:]).all(), name
