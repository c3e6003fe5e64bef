"""Initial rows of new tokens against NumPy, a plain orthogonal matching pursuit, and Hugging Face."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from sparsetrain.models import new_rows
from sparsetrain.models.new_rows import DonorRows

V, D, E, S, N = 60, 12, 9, 40, 7
Array = NDArray[np.float64]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OLD = draw(V, D)
IDS = torch.randperm(V, generator=torch.Generator().manual_seed(1))[:S]
DONOR = DonorRows(IDS, draw(S, E, seed=2), draw(N, E, seed=3))


def test_gaussian_rows_have_the_moments_of_hugging_face() -> None:
    """Hugging Face draws from N(mean, 1e-9 covariance); its deviations are scaled back here."""
    old, count = draw(40, 4) @ draw(4, 4, seed=1) + 3.0, 60_000
    rows = new_rows.gaussian_rows(old, count, torch.Generator().manual_seed(0)).numpy()
    np.testing.assert_allclose(rows.mean(0), old.mean(0), atol=0.05)
    np.testing.assert_allclose(np.cov(rows.T), np.cov(old.numpy().T, bias=True), atol=0.25, rtol=0.05)

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=4, n_layer=1, n_head=1, n_positions=8))
    model.transformer.wte.weight.data = old.float()
    model.tie_weights()
    model.resize_token_embeddings(40 + 2000, mean_resizing=True)
    theirs = model.transformer.wte.weight.detach()[40:].double().numpy()
    np.testing.assert_allclose(rows.mean(0), theirs.mean(0), atol=0.05)
    np.testing.assert_allclose(np.cov(rows.T), 1e9 * np.cov(theirs.T), atol=0.5, rtol=0.2)


def test_gaussian_rows_of_few_tokens_stay_in_their_span() -> None:
    """Three rows have a covariance of rank two, which has no Cholesky factor."""
    rows = new_rows.gaussian_rows(OLD[:3], 50, torch.Generator().manual_seed(0))
    assert torch.linalg.matrix_rank(rows - OLD[:3].mean(0), atol=1e-6) == 2


def test_subword_rows_by_hand() -> None:
    rows = new_rows.subword_rows(OLD, [[3], [1, 2, 2], []])
    torch.testing.assert_close(rows, torch.stack([OLD[3], (OLD[1] + 2 * OLD[2]) / 3, OLD.sum(0) / V]))


def test_the_least_squares_map_is_numpy_s() -> None:
    expected = DONOR.new.numpy() @ np.linalg.lstsq(DONOR.shared.numpy(), OLD[IDS].numpy(), rcond=None)[0]
    np.testing.assert_allclose(new_rows.least_squares_rows(OLD, DONOR), expected, atol=1e-10)
    few = DonorRows(IDS[:4], DONOR.shared[:4], DONOR.new)  # fewer shared tokens than dimensions: the smallest map
    expected = DONOR.new.numpy() @ np.linalg.lstsq(few.shared.numpy(), OLD[few.ids].numpy(), rcond=None)[0]
    np.testing.assert_allclose(new_rows.least_squares_rows(OLD, few), expected, atol=1e-10)


def test_a_donor_that_is_a_linear_image_gives_the_true_rows() -> None:
    """If the old rows are a linear map of the donor's, all of the new tokens' rows are found."""
    to_old = draw(E, D, seed=4)
    old = draw(V, D)
    old[IDS] = DONOR.shared @ to_old
    for rows in (new_rows.least_squares_rows(old, DONOR), new_rows.omp_rows(old, DONOR, E)):
        torch.testing.assert_close(rows, DONOR.new @ to_old)


def pursuit(target: Array, atoms: Array, k: int) -> Array:
    """Return the coefficients of orthogonal matching pursuit, fitted again from nothing at each step."""
    chosen: list[int] = []
    coefficients, left = np.zeros(len(atoms)), target
    for _ in range(k):
        strength = np.abs(atoms @ left) / np.linalg.norm(atoms, axis=1)
        strength[chosen] = -1.0
        chosen.append(int(strength.argmax()))
        fitted = np.linalg.lstsq(atoms[chosen].T, target, rcond=None)[0]
        left = target - fitted @ atoms[chosen]
    coefficients[chosen] = fitted
    return coefficients


@pytest.mark.parametrize("k", [1, 4, E])
def test_omp_is_the_plain_algorithm(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [pursuit(target, DONOR.shared.numpy(), k) @ OLD[IDS].numpy() for target in DONOR.new.numpy()]
    np.testing.assert_allclose(new_rows.omp_rows(OLD, DONOR, k), expected, atol=1e-9)
    monkeypatch.setattr(new_rows, "_IN_CACHE", 100)  # a few rows at a time
    np.testing.assert_allclose(new_rows.omp_rows(OLD, DONOR, k), expected, atol=1e-9)


def test_omp_stops_at_a_perfect_fit() -> None:
    """A target that is twice a shared row gives twice its old row; copies and zeros among the atoms do no harm."""
    shared = torch.cat([DONOR.shared[:5], DONOR.shared[:5], torch.zeros(1, E)]).double()
    donor = DonorRows(IDS[:11], shared, torch.stack([2 * shared[3], torch.zeros(E).double()]))
    rows = new_rows.omp_rows(OLD, donor, 9)
    torch.testing.assert_close(rows, torch.stack([2 * OLD[IDS[3]], torch.zeros(D).double()]))


def test_similar_rows_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = []
    for target in DONOR.new.numpy():
        cosines = DONOR.shared.numpy() @ target / np.linalg.norm(DONOR.shared.numpy(), axis=1) / np.linalg.norm(target)
        best = np.argsort(-cosines)[:3]
        weights = np.exp(cosines[best] / 0.1)
        expected.append(weights / weights.sum() @ OLD[IDS[torch.from_numpy(best)]].numpy())
    np.testing.assert_allclose(new_rows.similar_rows(OLD, DONOR, 3), expected)
    monkeypatch.setattr(new_rows, "_CHUNK", 1)
    np.testing.assert_allclose(new_rows.similar_rows(OLD, DONOR, 3), expected)
    assert new_rows.similar_rows(OLD, DONOR, 1000).shape == (N, D)


def test_norms() -> None:
    rows = new_rows.with_norm(torch.stack([OLD[0], torch.zeros(D).double()]), torch.tensor(2.5), OLD[1])
    torch.testing.assert_close(rows, 2.5 * torch.stack([OLD[0] / OLD[0].norm(), OLD[1] / OLD[1].norm()]))
