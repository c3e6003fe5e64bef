"""Trainer, Accelerate and Lightning move masks by our callback. The oracles are a loop of our own and a whole run."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from tiny_models import VOCAB
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import sparsetrain as st

ROWS = torch.randint(0, VOCAB, (48, 8), generator=torch.Generator().manual_seed(0))
RULES = {
    "rigl": lambda: st.RigL(sparsity=0.75, every=2, drop_fraction=0.3),
    "gmp": lambda: st.GMP(sparsity=0.75, every=2, start=0, stop=6),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Accelerate keeps its state for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def managed(rule: str = "rigl", seed: int = 0) -> tuple[GPT2LMHeadModel, st.MaskManager]:
    torch.manual_seed(seed)
    size = {"n_positions": 8, "n_embd": 32, "n_layer": 2, "n_head": 2}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **size, **dropout))
    return model, st.MaskManager(model, RULES[rule](), seed=seed)


def train(directory: Path, steps: int, rule: str = "rigl", seed: int = 0, resume: bool = False, **options: Any) -> Any:
    """Return the trainer and the manager after a training with saved checkpoints."""
    model, manager = managed(rule, seed)
    arguments = TrainingArguments(
        str(directory),
        max_steps=steps,
        per_device_train_batch_size=4,
        save_steps=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    callback = st.trainer_callback(manager)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=[callback])
    with redirect_stdout(io.StringIO()):
        trainer.train(resume_from_checkpoint=resume)
    return trainer, manager


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def loop(model: GPT2LMHeadModel, manager: st.MaskManager, losses: list[Callable[[], Tensor]]) -> None:
    """Train in a loop of our own, with the gradients of two losses added up and clipped."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for first, second in zip(losses[::2], losses[1::2], strict=True):
        first().backward()
        second().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        manager.step(optimizer)
        optimizer.zero_grad()


def test_trainer_moves_masks_as_a_loop_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    forward = GPT2LMHeadModel.forward

    def recording(self: GPT2LMHeadModel, input_ids: Tensor, labels: Tensor, **rest: Any) -> Any:
        seen.append({"input_ids": input_ids, "labels": labels, **rest})
        return forward(self, **seen[-1])

    monkeypatch.setattr(GPT2LMHeadModel, "forward", recording)
    trainer, manager = train(tmp_path, 5, gradient_accumulation_steps=2, save_strategy="no", optim="adamw_torch")
    monkeypatch.undo()
    model, own = managed()
    loop(model, own, [lambda inputs=inputs: model(**inputs).loss for inputs in seen])
    assert (own.steps, own.hash()) == (manager.steps, manager.hash())
    assert manager.watch()["mask_overlap"] < 1.0
    assert same(model, trainer.model)


@pytest.mark.parametrize("rule", ["rigl", "gmp"])
def test_trainer_resumes_with_the_masks_of_the_checkpoint(rule: str, tmp_path: Path) -> None:
    whole, manager = train(tmp_path / "whole", 7, rule)
    train(tmp_path / "cut", 4, rule)
    resumed, other = train(tmp_path / "cut", 7, rule, seed=5, resume=True)
    assert (manager.steps, manager.hash(), manager.seed) == (other.steps, other.hash(), other.seed)
    assert manager.watch() == other.watch()
    assert same(whole.model, resumed.model)


def test_the_best_checkpoint_comes_back_with_its_masks(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    trainer, _ = train(tmp_path, 8, metric_for_best_model="eval_loss", **options)
    best = GPT2LMHeadModel.from_pretrained(trainer.state.best_model_checkpoint)
    other = ({"checkpoint-4", "checkpoint-8"} - {Path(trainer.state.best_model_checkpoint).name}).pop()
    assert same(trainer.model, best)
    assert not same(trainer.model, GPT2LMHeadModel.from_pretrained(tmp_path / other))


def test_static_masks_need_no_callback(tmp_path: Path) -> None:
    """A sparse model resumes in a Trainer that knows nothing of masks."""
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no"
    )
    rows = [{"input_ids": row, "labels": row} for row in ROWS[:4]]
    first = managed()[0]
    with redirect_stdout(io.StringIO()):
        Trainer(first, arguments, train_dataset=rows).train()
    other = managed(seed=3)[0]
    with redirect_stdout(io.StringIO()):
        Trainer(other, arguments, train_dataset=rows).train(resume_from_checkpoint=True)
    assert same(first, other)


def test_a_checkpoint_without_the_managers_state_is_refused(tmp_path: Path) -> None:
    train(tmp_path, 4)
    (tmp_path / "checkpoint-4" / "mask_manager.npz").unlink()
    with pytest.raises(st.UserError, match=r"mask_manager.npz: no such file"):
        train(tmp_path, 7, resume=True)
    (tmp_path / "checkpoint-4" / "mask_manager.npz").write_bytes(b"PK")
    with pytest.raises(st.UserError, match=r"mask_manager.npz cannot be read as .npz"):
        train(tmp_path, 7, resume=True)


def test_accelerate_moves_masks_and_resumes(tmp_path: Path) -> None:
    def steps(first: int, last: int, seed: int, load: bool = False, save: bool = False) -> Any:
        model, manager = managed(seed=seed)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        prepared, wrapped = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(manager)
        if load:
            accelerator.load_state(str(tmp_path))
        for index in range(first, last):
            batch = ROWS[4 * index : 4 * index + 4]
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(input_ids=batch, labels=batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                wrapped.step()
                manager.step(wrapped)
                wrapped.zero_grad()
        if save:
            accelerator.save_state(str(tmp_path))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return model, manager

    whole, manager = steps(0, 10, 0)
    steps(0, 6, 0, save=True)
    resumed, other = steps(6, 10, 5, load=True)
    assert (other.steps, other.hash()) == (5, manager.hash())
    assert same(whole, resumed)


def test_lightning_moves_masks_and_resumes(tmp_path: Path) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(pl.LightningModule):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.model, self.manager = managed(seed=seed)

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.0)

    def fit(seed: int, checkpoint: Path | None = None) -> Module:
        module = Module(seed)
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            callbacks=[saving, st.lightning_callback(module.manager)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Lightning, about the workers of the loader
            trainer.fit(
                module, DataLoader(ROWS, batch_size=8), ckpt_path=checkpoint, weights_only=checkpoint is not None
            )
        return module

    whole = fit(0)
    model, manager = managed()
    batches = [*ROWS.split(8), *ROWS.split(8)]
    loop(model, manager, [lambda batch=batch: model(input_ids=batch, labels=batch).loss / 2 for batch in batches])
    assert (manager.steps, manager.hash()) == (6, whole.manager.hash())
    assert same(model, whole.model)
    resumed = fit(5, tmp_path / "epoch=0.ckpt")
    assert (resumed.manager.steps, resumed.manager.hash()) == (6, whole.manager.hash())
    assert same(resumed.model, whole.model)


def test_lightning_by_hand_is_refused() -> None:
    callback = st.lightning_callback(managed()[1])
    with pytest.raises(st.UserError, match=r"automatic_optimization=False: call manager.step\(optimizer\)"):
        callback.on_train_start(None, type("Manual", (), {"automatic_optimization": False}))
