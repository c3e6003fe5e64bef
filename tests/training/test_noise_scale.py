"""The observer of the gradient noise scale: against gradients taken one by one, and a run without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from runs import assert_same_run, records, stop_after, tensors
from torch import nn

from sparsetrain.errors import UserError
from sparsetrain.report.show import show_run
from sparsetrain.scaling.noise import NoiseScale
from sparsetrain.stages import PretrainConfig, pretrain
from sparsetrain.training.noise_scale import NoiseScaleObserver, WholeNoiseScaleObserver
from sparsetrain.training.observers import RunStart
from sparsetrain.training.state import Diverged, Interrupted

Configure = Callable[..., Any]
NOISE = {"observe": "noise_scale", "loop.accumulation": 2}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.frozen, self.out = nn.LayerNorm(6), nn.RMSNorm(6), nn.Linear(6, 1)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.frozen(self.norm(x)))
        return out


def _start(module: nn.Module, observer: NoiseScaleObserver | None = None) -> NoiseScaleObserver:
    observer = observer or NoiseScaleObserver()
    observer.start(RunStart("run", Path(), 0, 3, module))
    return observer


@pytest.mark.parametrize("everything", [False, True])
def test_the_estimate_is_that_of_gradients_taken_one_by_one(everything: bool) -> None:
    net, generator, expected = Net(), torch.Generator().manual_seed(0), NoiseScale()
    observer = _start(net, WholeNoiseScaleObserver() if everything else NoiseScaleObserver())
    measured = [one for one in net.parameters() if one.requires_grad] if everything else list(net.norm.parameters())
    for _ in range(3):
        x = torch.randn(4, 5, 6, generator=generator)
        singles = []
        for one in x:
            net.zero_grad()
            net(one[None]).square().mean().backward()
            singles.append(torch.cat([one.grad.flatten() for one in measured if one.grad is not None]))
        together = torch.stack(singles)
        expected.update(float(together.square().sum(1).mean()), float(together.mean(0).square().sum()), big=4)
        net.zero_grad()
        with observer.passes():
            for half in x.chunk(2):
                (net(half).square().mean() / 2).backward()
    assert list(observer.layers) == (["norm", "out"] if everything else ["norm"])
    found = observer.whole if isinstance(observer, WholeNoiseScaleObserver) else observer.scale
    assert found.value == pytest.approx(expected.value, rel=1e-4)
    assert found.interval() == pytest.approx(expected.interval(), rel=1e-4)


def test_what_cannot_be_measured_is_said_in_one_line(configure: Configure) -> None:
    for budget in (1, {"start": 8, "end": 1, "points": 2}):
        with pytest.raises(UserError, match=r"budget\.batch_size=1 must be at least 2"):
            configure(PretrainConfig, {"observe": "noise_scale", "budget.batch_size": budget})
    with pytest.raises(UserError, match="no LayerNorm or RMSNorm of the model has a parameter that trains"):
        _start(nn.Linear(2, 2))
    net = Net()
    observer = _start(net)
    with (
        pytest.raises(UserError, match="at least 2 examples in a step"),
        observer.passes(),
    ):
        net(torch.randn(1, 5, 6)).mean().backward()


class Name(str):
    """A text whose place in a set is that of its number."""

    def __new__(cls, text: str, number: int) -> Name:
        made = super().__new__(cls, text)
        made.number = number
        return made

    def __hash__(self) -> int:
        return int(self.number)

    __eq__ = str.__eq__
    number: int


def test_the_value_does_not_depend_on_the_order_of_a_set() -> None:
    observer = NoiseScaleObserver()
    names = [Name("a", 3), Name("b", 2), Name("c", 1)]
    observer._norms, observer.layers = set(names), {name: NoiseScale() for name in names}
    small = dict(zip(names, (2.0**53, 1.0, 1.0), strict=True))
    observer.add(small, dict.fromkeys(names, 0.0), 2)
    expected = NoiseScale()
    expected.update(2.0**53, 0.0, big=2)  # from the largest on, each 1 is lost in rounding
    assert observer.scale.noise == expected.noise


def test_an_observed_run_that_diverges_is_recorded_as_diverged(
    configure: Configure, tmp_path: Path, screen: Console
) -> None:
    for observe in ("noise_scale", "noise_scale_all"):
        settings = {**NOISE, "observe": observe, "optimizer.lr": 1e18}
        with pytest.raises(Diverged):
            pretrain(configure(PretrainConfig, settings, run_dir=tmp_path / observe), screen)
        assert json.loads((tmp_path / observe / "result.json").read_text())["status"] == "diverged"


def test_an_observed_run_has_the_bits_of_one_that_is_not_and_reports_the_noise_scale(
    configure: Configure, tmp_path: Path, screen: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = {"loop.accumulation": 2}
    pretrain(configure(PretrainConfig, plain, run_dir=tmp_path / "plain"), screen)
    pretrain(configure(PretrainConfig, NOISE, run_dir=tmp_path / "observed"), screen)
    found, expected = tensors(tmp_path / "observed"), tensors(tmp_path / "plain")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    steps = [record for record in records(tmp_path / "observed") if "loss" in record]
    assert all(record["noise_scale_low"] <= (record["noise_scale"] or 0.0) for record in steps)
    assert steps[-1]["noise_scale_layers"].keys() >= {"blocks.0.attn_norm", "final_norm"}
    result = json.loads((tmp_path / "observed" / "result.json").read_text())["noise_scale"]
    assert result["value"] == steps[-1]["noise_scale"]
    assert result["layers"].keys() == steps[-1]["noise_scale_layers"].keys()
    show_run(tmp_path / "observed", Console(width=120))
    assert "all norm layers" in capsys.readouterr().out


def test_a_resumed_run_goes_on_with_its_averages(
    configure: Configure, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = {**NOISE, "observe": "noise_scale_all"}
    pretrain(configure(PretrainConfig, noise, run_dir=tmp_path / "whole"), screen)
    config = configure(PretrainConfig, noise, run_dir=tmp_path / "cut")
    with monkeypatch.context() as patch:
        stop_after(patch, 7, accumulation=2)
        with pytest.raises(Interrupted):
            pretrain(config, screen)
    pretrain(config, screen)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
