"""Error messages: one line, with the nearest allowed value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsetrain.errors import UserError, as_number, check_choice, nearest, within


def test_nearest_names_the_closest_option_or_nothing() -> None:
    assert nearest("swigl", ["gelu", "swiglu"]) == " (did you mean 'swiglu'?)"
    assert nearest("zzz", ["gelu", "swiglu"]) == ""
    assert nearest("x", []) == ""


def test_check_choice_names_field_value_and_options() -> None:
    check_choice("mlp", "gelu", ["gelu", "swiglu"])
    with pytest.raises(UserError) as caught:
        check_choice("mlp", "gleu", ["gelu", "swiglu"])
    assert str(caught.value) == "mlp='gleu' is not one of gelu, swiglu (did you mean 'gelu'?)"


def test_a_user_error_is_a_value_error() -> None:
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize("value", ["a", b"1", None, [1.0], torch.ones(3), 10**400, 1j])
def test_what_is_no_number_is_one_line(value: object) -> None:
    with pytest.raises(UserError, match=r"^lr=.* must be a number$"):
        as_number("lr", value)


def test_what_holds_a_number_is_one() -> None:
    assert [as_number("lr", value) for value in (1, 0.5, np.float32(0.5), torch.tensor([2.0]))] == [1.0, 0.5, 0.5, 2.0]


def test_an_error_of_a_section_names_the_place_of_the_section() -> None:
    error = within("budget.phases[0].schedule", "schedule", UserError("schedule.warmup=2 must be below 1"))
    assert str(error) == "budget.phases[0].schedule.warmup=2 must be below 1"
    assert str(within("here", "schedule", UserError("scheduled too late"))) == "here: scheduled too late"
