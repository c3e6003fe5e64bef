"""Lightning with sparse layers: a callback that moves masks and is part of the checkpoints."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

from sparsetrain.errors import UserError
from sparsetrain.sparsity import MaskManager

# The same library under two names, whose classes differ.
_NAMES = ("lightning.pytorch", "pytorch_lightning")


def mask_callback(manager: MaskManager) -> Any:
    """Return a callback of the Lightning that the program has imported, or else of the one that is installed."""
    for name in sorted(_NAMES, key=lambda name: name not in sys.modules):
        try:
            library = importlib.import_module(name)
        except ImportError:
            continue
        return _callback(library.Callback, manager)
    raise UserError("lightning_callback needs Lightning: pip install lightning")


def _callback(base: type, manager: MaskManager) -> Any:
    class MaskCallback(base):
        """Steps the manager after each batch, when the gradients of the step are still there."""

        def __init__(self) -> None:
            self.manager = manager

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            if not pl_module.automatic_optimization:
                raise UserError(
                    "lightning_callback does not see the steps of a module with automatic_optimization=False: call "
                    "manager.step(optimizer) in its training_step, after optimizer.step()"
                )
            manager.attach(*trainer.optimizers)

        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            manager.step(*trainer.optimizers)

        def state_dict(self) -> dict[str, Any]:
            return manager.state_dict()

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            manager.load_state_dict(state_dict)

    return MaskCallback()
