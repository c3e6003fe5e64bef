"""Loop settings, signals, devices and precisions."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from typing import Any

import pytest
import torch

from sparsetrain.errors import UserError
from sparsetrain.training.state import LoopConfig, peak_rss_bytes, resolve_device, resolve_precision, stop_requests


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("accumulation", 0, "at least 1"),
        ("keep_last", 0, "at least 1"),
        ("eval_sequences", 0, "at least 1"),
        ("log_every", -1, "at least 0"),
        ("eval_every", -1, "at least 0"),
        ("checkpoint_every", -1, "at least 0"),
        ("precision", "fp23", "did you mean 'fp32'"),
    ],
)
def test_loop_settings_out_of_range_are_named(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(UserError, match=allowed) as caught:
        LoopConfig(**{field: value})
    assert field in str(caught.value)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert stop.signal_number is None
        os.kill(os.getpid(), number)
        assert stop.signal_number == number
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_stops_at_once() -> None:
    with stop_requests():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with stop_requests() as stop:
            seen.extend([stop.signal_number, signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None, before]


def test_devices_and_precisions_give_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="device='gpu' is not one of auto, cpu, cuda"):
        resolve_device("gpu")
    cpu = torch.device("cpu")
    assert resolve_device("cpu") == cpu
    assert resolve_precision("fp32", cpu) == (None, "fp32: asked for")
    assert resolve_precision("bf16", cpu) == (torch.bfloat16, "bf16 autocast: asked for")
    dtype, reason = resolve_precision("auto", cpu)
    assert dtype is None
    assert "reference on a CPU" in reason
    for supported, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        assert resolve_precision("auto", torch.device("cuda"))[0] is expected
    for present, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        assert resolve_device("auto").type == expected
    with pytest.raises(UserError, match="device=cuda: this torch sees no CUDA device"):
        resolve_device("cuda")


def test_peak_rss_is_in_bytes() -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    with open("/proc/self/statm", encoding="ascii") as stream:
        resident = int(stream.read().split()[1]) * page
    assert 0.5 * resident < peak_rss_bytes() < 100 * resident


def test_user_errors_cross_process_borders() -> None:
    assert str(pickle.loads(pickle.dumps(UserError("one line")))) == "one line"
