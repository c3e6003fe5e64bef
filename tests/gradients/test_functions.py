"""The gradient of a weight example by example, against products of single examples in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsetrain.gradients import functions
from sparsetrain.gradients.functions import weight_gradient
from sparsetrain.gradients.record import length_of


@settings(max_examples=30)
@given(
    examples=st.integers(1, 40),
    length=st.integers(1, 5),
    outputs=st.integers(1, 150),
    inputs=st.sampled_from([1, 3, 64, 200, 4096]),
    room=st.sampled_from([1, 1 << 14, 1 << 22]),
    add=st.booleans(),
)
def test_any_shape_and_any_room_give_the_sum_and_the_norms_of_its_terms(
    examples: int, length: int, outputs: int, inputs: int, room: int, add: bool
) -> None:
    """The room decides how many rows of how many examples are computed at a time."""
    torch.manual_seed(0)
    g = torch.randn(examples, outputs, length).mT  # a strided gradient
    x = torch.randn(examples, length, inputs)
    before = torch.randn(outputs, inputs)
    given_sum = before.clone() if add else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "_CPU_ELEMENTS", room)
        total, squared, _ = weight_gradient(g, x, total=given_sum)
    terms = torch.einsum("btm,btk->bmk", g.double(), x.double())
    expected = terms.sum(0) + (before.double() if add else 0.0)
    assert (total - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.allclose(squared.double(), terms.square().sum((1, 2)), rtol=1e-5)
    assert (total is given_sum) is add


def test_the_norm_of_millions_of_elements_has_six_digits() -> None:
    x = 3.0 + torch.randn(512, 4001, generator=torch.Generator().manual_seed(0))
    assert float(length_of(x.flatten())) == pytest.approx(float(x.double().norm()), rel=2e-6)
    assert float(length_of(x.mT)) == pytest.approx(float(x.double().norm()), rel=2e-6)
    assert float(length_of(x)) == pytest.approx(float(x.double().norm()), rel=2e-6)
    assert float(length_of(x.bfloat16())) == pytest.approx(float(x.bfloat16().double().norm()), rel=2e-6)
    assert float(length_of(torch.empty(0, 3))) == 0.0
    assert float(length_of(torch.tensor(-2.0))) == 2.0
