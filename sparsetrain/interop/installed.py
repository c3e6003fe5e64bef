"""What other libraries are told of sparse layers when they are imported."""

from __future__ import annotations

import warnings
from types import ModuleType

from sparsetrain.interop.late import Action, when_imported


def _modeling(module: ModuleType) -> None:
    from sparsetrain.interop.pretrained import keep_masks

    keep_masks(module)


def _trainer(module: ModuleType) -> None:
    from sparsetrain.interop.trainer import keep_masks

    keep_masks(module)


def _lora(module: ModuleType) -> None:
    from sparsetrain.interop.lora import serve_sparse_layers

    serve_sparse_layers(module)


def _guarded(action: Action) -> Action:
    def act(module: ModuleType) -> None:
        try:
            action(module)
        except (ImportError, AttributeError) as error:  # the import of the other library must not fail for this
            warnings.warn(f"sparsetrain does not fit this version of {module.__name__}: {error}", stacklevel=2)

    return act


def install() -> None:
    """Let transformers keep masks and peft adapt sparse layers, whether they are imported later or already."""
    when_imported("transformers.modeling_utils", _guarded(_modeling))
    when_imported("transformers.trainer", _guarded(_trainer))
    when_imported("peft.tuners.lora.model", _guarded(_lora))
