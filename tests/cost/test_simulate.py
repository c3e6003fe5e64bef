"""`simulate`: sums, bands, prices, and sizes that never make a step shorter."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsetrain import Machine, ModelConfig, Parallelism, Transformer, UserError, flops, simulate, sparsify
from sparsetrain.cost.hardware import shipped
from sparsetrain.sparsity import SparsityConfig

CONFIG = ModelConfig(d_model=256, n_layers=4, n_heads=4, vocab_size=512, sparsity=0.75, seed=0)


@pytest.mark.parametrize("name", shipped())
def test_terms_add_up_and_the_band_holds_the_estimate(name: str) -> None:
    found = simulate(CONFIG, name, 128, 8)
    assert math.fsum(found.terms.values()) == pytest.approx(found.seconds, rel=1e-9)
    assert all(seconds >= 0.0 for seconds in found.terms.values())
    assert found.band[0] < found.seconds < found.band[1]
    assert found.flops == flops(CONFIG, 128, 8).total
    assert found.tokens == 128 * 8


def test_a_run_is_its_steps() -> None:
    step, run = simulate(CONFIG, "h100", 128, 8), simulate(CONFIG, "h100", 128, 8, tokens=10_000)
    assert run.steps == 10  # 10,000 tokens begin a tenth step
    assert run.seconds == pytest.approx(10 * step.seconds, rel=1e-12)
    assert run.tokens == 10_240
    machine = Machine.load("h100")
    assert machine.power is not None
    assert machine.price is not None
    assert run.energy == pytest.approx(machine.power.value * run.seconds)
    assert run.cost == pytest.approx(machine.price.value * run.seconds / 3600)
    assert (step + run).seconds == pytest.approx(11 * step.seconds)


def test_a_gpu_counts_zeros_and_says_so_and_a_wafer_skips_them() -> None:
    wide = replace(CONFIG, d_model=4096, n_heads=32, vocab_size=4096)
    dense = replace(wide, sparsity=0.0)
    gpu = [simulate(config, "h100", 512, 8, dtype="bfloat16") for config in (wide, dense)]
    assert gpu[0].seconds == gpu[1].seconds
    assert gpu[0].peak_memory == gpu[1].peak_memory
    assert gpu[0].flops < gpu[1].flops
    assert "h100 cannot skip single zeros: sparse matrices are counted as dense." in gpu[0].notes
    assert not gpu[1].notes
    # With few tokens a wafer waits for weights, whose positions travel with them.
    wafer = [simulate(config, "cs3", 512, 64, dtype="bfloat16") for config in (wide, dense)]
    assert wafer[0].seconds < 0.7 * wafer[1].seconds
    assert not wafer[0].notes


def test_the_backend_masked_computes_zeros_everywhere() -> None:
    dense = replace(CONFIG, sparsity=0.0)
    masked = simulate(CONFIG, "zen4", 128, 8, backend="masked")
    products = masked.seconds - masked.terms["optimizer"]
    assert products == pytest.approx(
        simulate(dense, "zen4", 128, 8).seconds - simulate(dense, "zen4", 128, 8).terms["optimizer"]
    )
    assert simulate(CONFIG, "zen4", 128, 8, backend="csr").seconds < masked.seconds


def test_a_live_model_counts_as_its_configuration() -> None:
    live = Transformer(replace(CONFIG, sparsity=0.0), plan=SparsityConfig(sparsity=0.75, backend="csr"))
    assert simulate(live, "cs3", 128, 8).seconds == pytest.approx(simulate(CONFIG, "cs3", 128, 8).seconds, rel=1e-3)


def test_another_module_is_traced_and_left_alone() -> None:
    module = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 100))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = simulate(module, "a100", 32, 4)
    assert found.flops == 6 * 32 * 4 * (64 * 256 + 256 * 100)
    assert any("Only matrix products" in note for note in found.notes)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    sparsify(module, sparsity=0.5, seed=0)
    assert any("counted as dense" in note for note in simulate(module, "a100", 32, 4).notes)


@given(
    st.sampled_from(shipped()),
    st.integers(1, 6),
    st.integers(1, 64),
    st.floats(0.05, 0.95),
)
@settings(max_examples=20, deadline=None)
def test_more_of_anything_never_takes_less(name: str, layers: int, batch: int, sparsity: float) -> None:
    def found(**changes: Any) -> Any:
        of_step = {"layers": layers, "batch": batch, "context": 64, "sparsity": sparsity} | changes
        config = replace(CONFIG, n_layers=of_step["layers"], sparsity=of_step["sparsity"])
        return simulate(config, name, of_step["context"], of_step["batch"])

    base = found()
    for change in (
        {"layers": layers + 1},
        {"batch": batch + 1},
        {"context": 96},
        {"sparsity": 0.8 * sparsity},
        {"sparsity": 0.0},
    ):
        more = found(**change)
        assert more.flops >= base.flops, change
        assert more.seconds >= base.seconds * (1 - 1e-12), change


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("h1000", 128, 8), {}, r"machine='h1000' is not one of a100, .* \(did you mean 'h100'\?\)"),
        (("h100", 0, 8), {}, "context=0"),
        (("h100", 128, 8), {"tokens": -1}, "tokens=-1"),
        (("h100", 128, 8), {"threads": 0}, "threads=0"),
        (
            ("zen4", 128, 8),
            {"backend": "nope"},
            r"sparsity\.backend='nope' is not one of masked, csr, bsr, triton, auto",
        ),
        (("h100", 128, 8), {"dtype": "int4"}, "dtype='int4': h100 has a peak rate for"),
        (("h100", 128, 8), {"parallelism": Parallelism(tensor=3.0)}, "parallelism.tensor=3 does not divide the 4"),
        (("h100", 4096, 200_000), {}, r"GiB are missing; a batch of \d+ would fit"),
        (("missing.yaml", 128, 8), {}, "machine=missing.yaml: there is no such file"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        simulate(CONFIG, *arguments, **options)
    assert "\n" not in str(raised.value)


def test_this_machine_must_be_calibrated(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetrain.cost.hardware.cache_directory", lambda: tmp_path)
    with pytest.raises(UserError, match="machine=this: this machine was not measured yet; run: sparsetrain calibrate"):
        simulate(CONFIG, "this", 128, 8)
