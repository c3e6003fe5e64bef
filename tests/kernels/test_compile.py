"""Compiled kernels: the cache on disk, stale entries, any number of threads, and code for other processors."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from fresh import Fresh

from sparsetrain import kernels
from sparsetrain.kernels import csr
from sparsetrain.kernels.simd import compile as compiling
from sparsetrain.kernels.simd import threads as running
from sparsetrain.kernels.simd import vectors
from sparsetrain.kernels.simd.compile import fingerprint
from sparsetrain.kernels.simd.kernel import Kernel

FOLDER = Path(kernels.__file__).parent


def test_a_change_in_any_kernel_file_makes_another_cache(tmp_path: Path) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(FOLDER, copy)
    assert fingerprint(copy) == fingerprint()
    for name in ("simd/vectors.py", "simd/tiles.py", "csr.py"):
        before = fingerprint(copy)
        text = (copy / name).read_text()
        (copy / name).write_text(text + "# changed\n")
        assert fingerprint(copy) != before
        (copy / name).write_text(text)
        assert fingerprint(copy) == before


def separate(folder: Path, **variables: str) -> dict[str, str]:
    """Return the environment of a process that compiles into ``folder`` and whose coverage is not measured."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("COV_")}
    return {**env, compiling.CACHE: str(folder), **variables}


_USE = """
import sys
import torch
torch.set_num_threads(2)
from sparsetrain import SparseLinear
from sparsetrain.sparsity import block_pattern
kinds, lanes, *target = sys.argv[1:]
layers = {}
if "csr" in kinds:
    layers["csr"] = SparseLinear(70, 45, density=0.4, seed=0, backend="csr")
if "bsr" in kinds:
    blocks = block_pattern((84, 64), 0.5, torch.Generator().manual_seed(0), (14, 8))
    layers["bsr"] = SparseLinear(64, 84, pattern=blocks, seed=0)
assert "numba" not in sys.modules, "importing the library and making a layer imports no compiler"
if lanes != "own":
    from sparsetrain import machine
    features = f"{machine.target_features()},+avx512f"
    machine.target_features = lambda: features
    machine.target_name = lambda: "znver4" if lanes == "16 halved" else "x86-64-v4"
from sparsetrain.kernels.simd import vectors
if lanes != "own":
    assert vectors.NATIVE_LANES == 16 and vectors.PATH_LANES == (16 if lanes == "16" else 8)
for backend, layer in layers.items():
    torch.manual_seed(0)
    x, g = torch.randn(300, layer.in_features, requires_grad=True), torch.randn(300, layer.out_features)
    results = []
    for layer.backend in (backend, "masked"):
        y = layer(x)
        results.append((y, *torch.autograd.grad(y, (x, layer.values), g)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)
if "attention" in kinds:
    sys.path.insert(0, "FOLDER")
    import test_attention
    assert test_attention.gemm.WIDTH == max(16, 2 * vectors.NATIVE_LANES)
    torch.manual_seed(0)
    for tokens, d in ((1, 16), (33, 48), (130, 80)):
        test_attention.check(torch.randn(1, tokens, 4, d), 1, d**-0.5, torch.tensor([0.5, 0.1]))
from sparsetrain.kernels import csr
kernels = (csr.reorder_runs, csr.reorder, csr.multiply, csr.gradients) if "csr" in kinds else ()
print(all(bool(kernel.compiled.cache_hits) for kernel in kernels))
if target:
    from llvmlite import binding
    binding.initialize_all_targets(); binding.initialize_all_asmprinters()
    module = binding.parse_assembly(csr.multiply.compiled.inspect_llvm())
    module.triple, cpu = target
    machine = binding.Target.from_triple(module.triple).create_target_machine(cpu=cpu, opt=3)
    print(machine.emit_assembly(module))
""".replace("FOLDER", str(Path(__file__).parent))


def use(fresh: Fresh, env: dict[str, str], kinds: str, *target: str, lanes: str = "own") -> tuple[bool, str]:
    """Compare kernels with dense products in a new process; return whether csr's came from the cache, and assembly.

    Args:
        env: the environment of the process.
        kinds: words out of csr, bsr and attention.
        target: triple and name of a processor, for which a kernel is compiled as well.
        lanes: of another kind of processor, instead of what ``env`` says.
    """
    run = fresh.run(_USE, kinds, lanes, *target, env=env)
    assert run.returncode == 0, run.stderr
    hit, code = run.stdout.split("\n", 1)
    return hit == "True", code


def instructions(features: str) -> dict[str, str]:
    """Return the variables that compile kernels for an x86 with these features; empty on another architecture."""
    x86 = os.uname().machine == "x86_64"
    return {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": features} if x86 else {}


# Compiling takes seconds, so each process compares everything that its processor is needed for. LLVM splits 16 lanes
# over registers of 8, so that every kind of kernel can be tested on every machine.
_KIND = f"{vectors.NATIVE_LANES}" + (" halved" if vectors.PATH_LANES < vectors.NATIVE_LANES else "")


@pytest.mark.slow
def test_products_are_right_without_avx_and_the_same_kernel_becomes_code_for_arm(fresh: Fresh, tmp_path: Path) -> None:
    # A kernel that uses AVX intrinsics could not be compiled for ARM.
    hit, code = use(fresh, separate(tmp_path, **instructions("+sse2")), "csr", "aarch64-unknown-linux-gnu", "generic")
    assert not hit
    assert "fmla" in code


@pytest.mark.slow
def test_products_are_right_with_avx2_alone_and_a_second_process_reads_what_the_first_compiled(
    fresh: Fresh, tmp_path: Path
) -> None:
    env = separate(tmp_path, **instructions("+sse4.2,+avx,+avx2,+fma"))
    kinds = "csr" if vectors.NATIVE_LANES == 8 else "csr bsr attention"  # with 8 lanes all other tests run on them
    hit, code = use(fresh, env, kinds, "x86_64-unknown-linux-gnu", "skylake-avx512")
    assert not hit
    assert "%zmm" in code
    hit, *_ = use(fresh, env, "csr")
    assert hit


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [kind for kind in ("16", "16 halved") if kind != _KIND])
def test_products_are_right_with_the_lanes_of_another_kind_of_processor(
    fresh: Fresh, tmp_path: Path, lanes: str
) -> None:
    # The other kernels are the same with 16 lanes, halved or not.
    other = [] if vectors.NATIVE_LANES == 16 else ["bsr attention"] if lanes == "16" else []
    use(fresh, separate(tmp_path), " ".join(["csr", *other]), lanes=lanes)


_REORDER = """
import sys, time
from pathlib import Path
import numpy as np
from sparsetrain.kernels import csr
ready, folder = Path(sys.argv[1]), Path(sys.argv[1]).parent
ready.touch()
while len(list(folder.glob("ready*"))) < 2:
    time.sleep(0.001)
target = np.empty(3, np.float32)
order = np.int32([2, 0, 1])
csr.reorder(1, values=np.float32([1, 2, 3]), nonzeros=3, order=order, stored=3, target=target)
print(*target)
"""


def test_processes_that_compile_at_once_leave_what_another_reads(
    fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = tmp_path / "kernels"
    env = separate(kernels)
    processes = [fresh.start(_REORDER, str(tmp_path / f"ready{number}"), env=env) for number in range(2)]
    assert [process.wait().stdout for process in processes] == ["3.0 1.0 2.0\n"] * 2
    monkeypatch.setattr(compiling, "compiled_directory", lambda: kernels / fingerprint())
    assert Kernel(csr.reorder.function).compiled.cache_hits


def test_of_two_threads_one_compiles_and_the_other_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true_cfunc, directories = numba.cfunc, []

    def cfunc(*arguments: Any, **options: Any) -> Any:
        directories.append(numba.config.CACHE_DIR)
        time.sleep(0.1)  # long enough for the other thread to enter
        return true_cfunc(*arguments, **options)

    monkeypatch.setattr(compiling, "compiled_directory", lambda: tmp_path)
    monkeypatch.setattr(numba, "cfunc", cfunc)
    kernel = Kernel(csr.reorder.function)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: kernel.compiled, range(2))
    assert one is other
    assert directories == [str(tmp_path)]


def test_the_directory_of_the_cache_is_changed_by_one_thread_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = numba.config.CACHE_DIR, []

    def declare(name: str) -> None:
        with compiling.numba_cache() as writable:
            seen.append((name, writable, numba.config.CACHE_DIR))
            time.sleep(0.05)
            seen.append((name, writable, numba.config.CACHE_DIR))

    monkeypatch.setattr(compiling, "compiled_directory", lambda: tmp_path)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(declare, "ab"))
    assert seen[0] == seen[1] != seen[2] == seen[3]
    assert all(entry[1:] == (True, str(tmp_path)) for entry in seen)
    # A second thread must not save the temporary setting of the first and restore it later.
    assert before == numba.config.CACHE_DIR


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(compiling, "compiled_directory", lambda: tmp_path / "file" / "below")
    with compiling.numba_cache() as writable:
        assert not writable


Runner = Callable[[int], np.ndarray]


@pytest.fixture
def runner() -> tuple[Runner, np.ndarray]:
    draw = np.random.default_rng(0)
    values, order = draw.standard_normal(10_007, dtype=np.float32), draw.permutation(10_007).astype(np.int32)

    def run(threads: int) -> np.ndarray:
        target = np.full(len(order), np.nan, np.float32)
        count = len(order)
        csr.reorder(threads, values=values, nonzeros=count, order=order, stored=count, target=target)
        return target

    return run, values[order]


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_any_number_of_threads_does_all_of_the_work(threads: int, runner: tuple[Runner, np.ndarray]) -> None:
    run, expected = runner
    np.testing.assert_array_equal(run(threads), expected)


@pytest.mark.parametrize("threads", [2, 5])
def test_plain_threads_do_where_there_is_no_openmp(
    threads: int, runner: tuple[Runner, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "openmp", lambda: None)
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
    # This is the case of a DataLoader's workers, where torch also has one thread: GNU's OpenMP does not survive a fork.
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
    assert running.openmp() is not None
