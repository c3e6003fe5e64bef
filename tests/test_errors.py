"""Error messages: one line, with the nearest allowed value."""

from __future__ import annotations

import pytest

from sparsetrain.errors import UserError, check_choice, nearest


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
