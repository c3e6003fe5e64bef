"""Initial values for the embeddings of new tokens, from the rows of old tokens and from the embeddings of a donor.

Shapes: V old tokens, N new tokens, D width of the model; S tokens that the model shares with a donor, E width of the
donor. All matrices are float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

METHODS = ("random", "mean", "gaussian", "subword_mean", "similarity", "omp", "least_squares")
DONOR_METHODS = ("similarity", "omp", "least_squares")
# The number of shared tokens that a new row is combined from.
DEFAULT_K = {"similarity": 10, "omp": 64}
_TEMPERATURE = 0.1  # of the weights of similar tokens
_DONE = 1e-10  # the share of a vector's norm that counts as nothing
_CHUNK = 1 << 25  # numbers of an intermediate result
_IN_CACHE = 1 << 20  # numbers of one that is read again and again


@dataclass(frozen=True)
class DonorRows:
    """The embeddings of a donor that say where the new tokens lie among the shared ones.

    Attributes:
        ids: int64 ``[S]``, the old ids of the shared tokens.
        shared: ``[S, E]``, the donor's embeddings of the shared tokens.
        new: ``[N, E]``, the donor's embeddings of the new tokens.
    """

    ids: Tensor
    shared: Tensor
    new: Tensor


def random_rows(count: int, width: int, std: float, generator: torch.Generator) -> Tensor:
    """Return ``[count, width]`` from N(0, std^2)."""
    return torch.randn(count, width, generator=generator, dtype=torch.float64) * std


def gaussian_rows(old: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return ``[count, D]`` from N(mean, covariance) of the rows of ``old`` ``[V, D]``, with divisor V."""
    mean = old.mean(0)
    centred = old - mean
    scales, axes = torch.linalg.eigh(centred.T @ centred / len(old))
    draws = torch.randn(count, old.shape[1], generator=generator, dtype=torch.float64)
    rows: Tensor = mean + (draws * scales.clamp_min(0.0).sqrt()) @ axes.T
    return rows


def subword_rows(old: Tensor, pieces: Sequence[Sequence[int]]) -> Tensor:
    """Return ``[N, D]``: the mean of ``old[pieces]`` for each new token, and the mean of all rows for no pieces."""
    mean = old.mean(0)
    return torch.stack([old[list(ids)].mean(0) if ids else mean for ids in pieces])


def similar_rows(old: Tensor, donor: DonorRows, k: int) -> Tensor:
    """Return ``[N, D]``: averages of the old rows of the k shared tokens that are most similar for the donor.

    The weights are the softmax of the cosines divided by 0.1, as in WECHSEL (arXiv 2112.06598).
    """
    directions, found = _unit(donor.shared), []
    for part in donor.new.split(max(1, _CHUNK // len(directions))):
        cosines, places = (_unit(part) @ directions.T).topk(min(k, len(directions)))
        weights = (cosines / _TEMPERATURE).softmax(-1)
        found.append(torch.einsum("nk,nkd->nd", weights, old[donor.ids[places]]))
    return torch.cat(found)


def least_squares_rows(old: Tensor, donor: DonorRows) -> Tensor:
    """Return ``[N, D]``: the donor's rows under the linear map that fits the shared tokens best (arXiv 2407.12869).

    The map A minimises the sum of |A e_donor(v) - e_old(v)|^2 over the shared tokens v; of several, the smallest one.
    """
    fitted = torch.linalg.lstsq(donor.shared, old[donor.ids], driver="gelsd").solution
    rows: Tensor = donor.new @ fitted
    return rows


def omp_rows(old: Tensor, donor: DonorRows, k: int) -> Tensor:
    """Return ``[N, D]``: each donor row as a sum of at most k shared rows, with old rows in their places.

    Orthogonal matching pursuit (Pati et al. 1993; for embeddings arXiv 2506.06607): each step takes the shared token
    whose direction correlates most with what is left of the donor's row, and fits all coefficients again.
    """
    k = min(k, *donor.shared.shape)
    directions = _unit(donor.shared)
    parts = donor.new.split(max(1, _IN_CACHE // max(k * donor.shared.shape[1], len(donor.shared))))
    return torch.cat([_pursue(old, donor, directions, part, k) for part in parts])


def _pursue(old: Tensor, donor: DonorRows, directions: Tensor, targets: Tensor, k: int) -> Tensor:
    count, width = targets.shape
    basis, upper = targets.new_empty(count, k, width), torch.eye(k, dtype=targets.dtype).repeat(count, 1, 1)
    along, chosen = targets.new_zeros(count, k), torch.zeros(count, k, dtype=torch.int64)
    left, small = targets.clone(), _DONE * targets.norm(dim=-1)
    strength = targets.new_empty(count, len(directions))
    for step in range(k):
        torch.mm(left, directions.T, out=strength).abs_().scatter_(1, chosen[:, :step], -1.0)
        place = strength.argmax(-1)
        chosen[:, step] = place
        atom = donor.shared[place]
        before, rest, parts, size = basis[:, :step], atom, targets.new_zeros(count, step), atom.norm(dim=-1)
        # Where a pass takes more than half of a vector, a second one removes what rounding has left of `before`.
        for _ in range(2):
            share = torch.bmm(before, rest[:, :, None])[:, :, 0]
            rest = torch.baddbmm(rest[:, None], share[:, None], before, alpha=-1.0)[:, 0]
            parts = parts + share
            length = rest.norm(dim=-1)
            if bool((length >= 0.5 * size).all()):
                break
        used = (left.norm(dim=-1) > small) & (length > _DONE * size)
        direction = torch.where(used[:, None], rest / length.clamp_min(1e-300)[:, None], 0.0)
        # A step without use leaves a column of the identity, so that its coefficient is 0.
        upper[:, :step, step] = torch.where(used[:, None], parts, 0.0)
        upper[:, step, step] = torch.where(used, length, 1.0)
        basis[:, step] = direction
        along[:, step] = (direction * left).sum(-1)
        left = left - along[:, step, None] * direction
    coefficients = torch.linalg.solve_triangular(upper, along[:, :, None], upper=True)
    return torch.bmm(coefficients.mT, old[donor.ids[chosen]])[:, 0]


def with_norm(rows: Tensor, norm: Tensor, fallback: Tensor) -> Tensor:
    """Return ``rows`` ``[N, D]`` scaled to one norm; ``fallback`` ``[D]`` stands in for rows of zeros."""
    rows = torch.where(rows.norm(dim=-1, keepdim=True) > 0.0, rows, fallback)
    return _unit(rows) * norm


def _unit(rows: Tensor) -> Tensor:
    """Return the rows divided by their norms; a row of zeros stays."""
    norms = rows.norm(dim=-1, keepdim=True)
    return rows / torch.where(norms > 0.0, norms, 1.0)
