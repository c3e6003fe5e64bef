"""Compiled kernels: kept on the disk, noticed to be stale, run on any number of threads, built for other processors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsetrain.kernels import compile as compiling
from sparsetrain.kernels import csr
from sparsetrain.kernels.compile import fingerprint

FOLDER = Path(compiling.__file__).parent


def test_a_change_in_any_kernel_file_makes_another_cache(tmp_path: Path) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(FOLDER, copy)
    assert fingerprint(copy) == fingerprint()
    for name in ("simd.py", "tiles.py", "csr.py"):
        before = fingerprint(copy)
        text = (copy / name).read_text()
        (copy / name).write_text(text + "# changed\n")
        assert fingerprint(copy) != before
        (copy / name).write_text(text)
        assert fingerprint(copy) == before


_USE = """
import sys, time
import torch
torch.set_num_threads(2)
from sparsetrain import SparseLinear
layer = SparseLinear(40, 24, density=0.5, seed=0, backend="csr")
assert "numba" not in sys.modules, "importing the library and making a layer imports no compiler"
x = torch.randn(70, 40, requires_grad=True)
started = time.perf_counter()
layer(x).sum().backward()
from sparsetrain.kernels import csr, layout
hits = [bool(kernel.compiled.cache_hits) for kernel in (csr.gather_runs, csr.gather, csr.multiply, csr.gradients)]
print(all(hits), time.perf_counter() - started)
"""


def use(env: dict[str, str]) -> tuple[bool, float]:
    run = subprocess.run([sys.executable, "-c", _USE], env=env, capture_output=True, text=True, timeout=300, check=True)
    hit, seconds = run.stdout.split()
    return hit == "True", float(seconds)


@pytest.mark.slow
def test_the_second_process_reads_what_the_first_compiled(tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("COV_")}
    env[compiling.CACHE] = str(tmp_path)
    hit, first = use(env)
    assert not hit
    hit, second = use(env)
    assert hit
    # Tests run side by side on a shared machine; what a quiet one takes is in LOG.md.
    assert second < first / 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compiling, "compiled_directory", lambda: tmp_path / "file" / "below")
    with compiling._numba_cache() as writable:
        assert not writable


def problem(tokens: int = 200, columns: int = 48) -> tuple[Any, ...]:
    x = np.random.default_rng(0).standard_normal((tokens, columns), dtype=np.float32)
    tiles = -(-tokens // 64)
    padded = np.zeros((tiles * 64, columns), np.float32)
    padded[:tokens] = x
    return x, padded.reshape(tiles, 64, columns).transpose(0, 2, 1)


Runner = Callable[[int], np.ndarray]


@pytest.fixture
def runner() -> tuple[Runner, np.ndarray]:
    x, expected = problem()

    def run(threads: int) -> np.ndarray:
        packed = np.full(expected.shape, np.nan, np.float32)
        csr.pack_all(threads, x, x.shape[1], len(x), x.shape[1], packed)
        return packed

    return run, expected


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_any_number_of_threads_does_all_of_the_work(threads: int, runner: tuple[Runner, np.ndarray]) -> None:
    run, expected = runner
    np.testing.assert_array_equal(run(threads), expected)


@pytest.mark.parametrize("threads", [2, 5])
def test_plain_threads_do_where_there_is_no_openmp(
    threads: int, runner: tuple[Runner, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "openmp", lambda: None)
    run, expected = runner
    np.testing.assert_array_equal(run(threads), expected)


def test_several_callers_at_once_do_not_disturb_each_other(runner: tuple[Runner, np.ndarray]) -> None:
    run, expected = runner
    results: list[np.ndarray] = []
    callers = [threading.Thread(target=lambda: results.extend(run(2) for _ in range(20))) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 60
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_a_forked_process_runs_kernels_on_one_thread(runner: tuple[Runner, np.ndarray]) -> None:
    # As in the workers of a DataLoader, where torch has one thread too: GNU's OpenMP does not survive a fork.
    run, expected = runner
    run(2)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(run(1), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only there does the system say what is loaded")
def test_torchs_own_openmp_is_found() -> None:
    import torch

    assert torch.get_num_threads() >= 1
    assert compiling.openmp() is not None


_OTHER = """
import sys
from llvmlite import binding
from sparsetrain.kernels import simd
target = sys.argv[1]
if target.startswith("aarch64"):
    simd._AVX = False
from sparsetrain.kernels import csr
code = csr.multiply.compiled.inspect_llvm()
binding.initialize_all_targets(); binding.initialize_all_asmprinters()
module = binding.parse_assembly(code)
triple, cpu = ("aarch64-unknown-linux-gnu", "generic") if target == "aarch64" else ("x86_64-unknown-linux-gnu", target)
module.triple = triple
machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
print(machine.emit_assembly(module))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("target", "wanted"), [("skylake-avx512", "%zmm"), ("aarch64", "fmla")])
def test_the_same_kernel_becomes_machine_code_of_other_processors(target: str, wanted: str, tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("COV_")}
    env[compiling.CACHE] = str(tmp_path)  # what is read from the disk is machine code of this processor
    command = [sys.executable, "-c", _OTHER, target]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert wanted in run.stdout


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names features of x86")
@pytest.mark.parametrize("features", ["+sse2", "+sse4.2,+avx,+avx2,+fma"])
def test_products_are_right_with_fewer_instructions(features: str, tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("COV_")}
    env |= {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": features, compiling.CACHE: str(tmp_path)}
    script = (
        "import torch\nfrom sparsetrain import SparseLinear\n"
        "layer = SparseLinear(70, 45, density=0.4, seed=0, backend='csr'); x = torch.randn(150, 70)\n"
        "x.requires_grad_(); g = torch.randn(150, 45); results = []\n"
        "for layer.backend in ('csr', 'masked'):\n"
        "    y = layer(x); results.append((y, *torch.autograd.grad(y, (x, layer.values), g)))\n"
        "torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)\n"
    )
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
