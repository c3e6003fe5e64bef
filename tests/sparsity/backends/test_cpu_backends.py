"""What csr and bsr have in common: how work is shared by threads, and that all of it is done."""

from __future__ import annotations

import pytest
import torch
from hardship import fill_with_poison, lend_at_most, work_for_every_thread
from products import arguments
from torch import Tensor

from sparsetrain.errors import UserError
from sparsetrain.sparsity import SparsityPattern
from sparsetrain.sparsity.backends import cpu as cpu_backend
from sparsetrain.sparsity.backends.base import BACKENDS
from sparsetrain.sparsity.layers import ops


class Problem:
    """A matrix of 80 x 144, 150 tokens, and the three products of a backend."""

    def __init__(self, backend: str) -> None:
        block = (1, 1) if backend == "csr" else (5, 16)
        occupied = torch.rand(80 // block[0], 144 // block[1], generator=torch.Generator().manual_seed(0)) < 0.2
        mask = occupied.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        self.backend, self.pattern = BACKENDS[backend], SparsityPattern.from_mask(mask, block)
        self.x, self.g, self.values = torch.randn(150, 144), torch.randn(150, 80), torch.randn(self.pattern.nnz)

    def products(self) -> tuple[Tensor, Tensor, Tensor]:
        y, kept = self.backend.forward(self.x, self.values, self.pattern, keep=True)
        given = (self.g, self.x, self.values, kept, self.pattern)
        return y, *self.backend.backward(*given, need_x=True, need_values=True)


@pytest.fixture(params=["csr", "bsr"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(request.param)


def test_every_element_is_written(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = problem.products()
    fill_with_poison(monkeypatch)
    with work_for_every_thread():
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for mine, other in zip(problem.products(), expected, strict=True):
                torch.testing.assert_close(mine, other)


def test_a_runtime_may_lend_fewer_threads_than_asked_for(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = problem.products()
    asked = lend_at_most(2, monkeypatch)
    fill_with_poison(monkeypatch)
    torch.set_num_threads(5)
    with work_for_every_thread():
        found = problem.products()
    assert asked.count(5) == 2  # the product, and the gradients
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_small_product_wakes_no_thread(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = lend_at_most(2, monkeypatch)
    torch.set_num_threads(2)
    problem.products()
    assert asked == []


def test_a_thread_is_woken_for_so_many_multiply_adds(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    monkeypatch.setattr(cpu_backend, "A_THREAD", 10 * problem.pattern.nnz)
    tokens = (0, 9, 10, 19, 20, 1000)
    assert [cpu_backend.workers(count, problem.pattern) for count in tokens] == [1, 1, 1, 1, 2, 3]


@pytest.mark.parametrize(
    ("tokens", "tiles", "threads", "expected"),
    [
        (0, 1, 4, 1),
        (1, 1, 4, 4),
        (64, 1, 4, 4),
        (65, 1, 4, 2),
        (192, 1, 4, 4),
        (512, 1, 4, 1),
        (512, 2, 8, 2),
        (9, 1, 1, 1),
    ],
)
def test_tiles_are_cut_so_that_all_threads_have_as_much(tokens: int, tiles: int, threads: int, expected: int) -> None:
    assert cpu_backend.pieces(tokens, tiles, threads) == expected


@pytest.mark.parametrize("name", ["csr", "bsr"])
def test_contractions_that_would_read_outside_are_refused(name: str) -> None:
    """A wrong width, too few values or rows: said before a kernel sees them, also through the custom op."""
    block = (1, 1) if name == "csr" else (4, 4)
    pattern = SparsityPattern.from_mask(torch.ones(16, 24, dtype=torch.bool), block)
    x, g, values = torch.randn(5, 24), torch.randn(5, 16), torch.randn(pattern.nnz)
    backend = BACKENDS[name]
    for call in (
        lambda: backend.matmul(x[:, :8], values, pattern),
        lambda: backend.matmul(x, values[:-1], pattern),
        lambda: backend.matmul_t(g[:, :8], values, pattern),
        lambda: backend.sampled(g, x[:4], pattern),
        lambda: backend.sampled(g[:, :3], x, pattern),
        lambda: ops._sparse_linear(*arguments(pattern, x[:, :8].contiguous(), values, name)),
    ):
        with pytest.raises(UserError, match=r"has shape|have shape|rows"):
            call()
