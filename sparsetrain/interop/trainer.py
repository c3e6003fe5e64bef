"""transformers' ``Trainer`` with sparse layers: masks that evolve, and checkpoints that bring them back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from sparsetrain.errors import UserError
from sparsetrain.files import read_json
from sparsetrain.interop.manager_file import load_manager, save_manager
from sparsetrain.interop.mask_file import MASK_FILE, read_masks
from sparsetrain.interop.pretrained import by_names, wrap
from sparsetrain.sparsity import MaskManager
from sparsetrain.sparsity.layers.surgery import sparse_layers


class MaskCallback(TrainerCallback):
    """Calls ``manager.step`` after each step of the optimizer, and saves the manager in every checkpoint.

    ``trainer.train(resume_from_checkpoint=...)`` restores masks, weights, moments and the manager.
    """

    def __init__(self, manager: MaskManager) -> None:
        self.manager = manager

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if isinstance(optimizer, Optimizer):
            self.manager.attach(optimizer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.manager.step(optimizer)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero:
            return
        if directory.is_dir():
            save_manager(directory, self.manager)
        else:
            warnings.warn(f"{directory} does not exist, so the state of the masks is not saved", stacklevel=2)

    def restore(self, directory: Path) -> None:
        """Restore the manager from a checkpoint, after the model."""
        load_manager(directory, self.manager)


def keep_masks(trainer: ModuleType) -> None:
    """Wrap the methods of ``transformers.trainer.Trainer`` that load a checkpoint into its model."""
    wrap(trainer.Trainer, "_load_from_checkpoint", _resuming)
    wrap(trainer.Trainer, "_load_best_model", _loading_best)


def _resuming(load: Callable[..., Any]) -> Callable[..., Any]:
    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> Any:
        directory = Path(resume_from_checkpoint)
        set_masks(self.model, directory)
        result = load(self, resume_from_checkpoint, *args, **kwargs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, MaskCallback):
                callback.restore(directory)
        return result

    return _load_from_checkpoint


def _loading_best(load: Callable[..., Any]) -> Callable[..., Any]:
    def _load_best_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        set_masks(self.model, Path(self.state.best_model_checkpoint))
        return load(self, *args, **kwargs)

    return _load_best_model


def set_masks(model: nn.Module, directory: Path) -> None:
    """Give the sparse layers of a model the masks of a checkpoint; its weights are then to be loaded.

    A directory without masks changes nothing.

    Raises:
        UserError: the checkpoint has no mask for a sparse layer, or its masks cannot be read.
    """
    layers = dict(sparse_layers(model))
    if not layers or not (directory / MASK_FILE).is_file():
        return
    masks = read_masks(directory, read_json(directory / "config.json", dict[str, Any]))
    masks, _ = by_names(masks, layers, getattr(model, "base_model_prefix", ""))
    for name, layer in layers.items():
        if name not in masks:
            raise UserError(f"{directory / MASK_FILE} has no mask for layer {name}, which is sparse in the model")
        mask, own = masks[name], layer.pattern
        if not (torch.equal(mask.row_ptr, own.row_ptr.cpu()) and torch.equal(mask.col, own.col.cpu())):
            layer.set_topology(mask, layer.values.new_zeros(mask.nnz))
