"""Callbacks by which the training loops of other libraries move masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsetrain.sparsity import MaskManager

if TYPE_CHECKING:
    from sparsetrain.interop.trainer import MaskCallback


def trainer_callback(manager: MaskManager) -> MaskCallback:
    """Return a callback with which transformers' ``Trainer`` moves masks, saves them and resumes with them.

    ::

        manager = st.MaskManager(model, st.RigL(sparsity=0.9, every=100), seed=0)
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[st.trainer_callback(manager)])
        trainer.train()

    The masks move after each step of the optimizer, before gradients are set to zero; micro-batches and skipped steps
    do not count. Each checkpoint holds the manager's state in ``mask_manager.npz``.

    Args:
        manager: of the model that is trained, made before the trainer.
    """
    from sparsetrain.interop.trainer import MaskCallback  # with transformers, which is slow to import

    return MaskCallback(manager)


def lightning_callback(manager: MaskManager) -> Any:
    """Return a callback with which Lightning's ``Trainer`` moves masks, saves them and resumes with them.

    It serves ``lightning`` and ``pytorch_lightning``, with automatic optimization: masks move after each step of the
    optimizers. With manual optimization call ``manager.step(optimizer)`` in ``training_step`` instead. The manager's
    state is part of each checkpoint. Make the model sparse in the constructor of the module, so that a checkpoint finds
    sparse layers.

    Args:
        manager: of the module that is trained or of a part of it.

    Raises:
        UserError: neither library is installed.
    """
    from sparsetrain.interop.lightning import mask_callback

    return mask_callback(manager)
