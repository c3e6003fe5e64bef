"""Text from a trained run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sparsetrain.errors import UserError, check_choice
from sparsetrain.models import SoftPrompt, Transformer
from sparsetrain.sparsity import densify
from sparsetrain.stages.config import RunConfig, build
from sparsetrain.stages.pretrain import build_model
from sparsetrain.stages.run import read_config, run_tokenizer, run_weights
from sparsetrain.training.loop import load_weights
from sparsetrain.training.state import DEVICES, resolve_device


@dataclass
class GenerateConfig:
    """Continue a text.

    Args:
        init_from: the run directory. prompt: the text to continue.
        max_new_tokens: how many tokens to add at most; generation also ends at the end-of-text token.
        temperature: 0 takes the likeliest token. top_p: draw from the likeliest tokens that hold this probability.
        soft_prompt: put the run's soft prompt behind the text, if the run has one.
    """

    init_from: str | None = None
    prompt: str = ""
    max_new_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 0.95
    soft_prompt: bool = True
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_choice("device", self.device, DEVICES)
        if self.init_from is None:
            raise UserError("init_from is missing: the run directory to generate from, init_from=RUN_DIR")


def load_run(directory: Path, device: torch.device) -> tuple[Transformer, SoftPrompt | None]:
    """Return the model of a run, as sparse or dense as its checkpoint, and its soft prompt if it learned one."""
    values = read_config(directory)
    common = RunConfig.__dataclass_fields__
    config = build(RunConfig, {key: value for key, value in values.items() if key in common})
    weights = run_weights(directory)
    prompt = None
    if "prompt.vectors" in weights:
        prompt = SoftPrompt.from_embeddings(weights.pop("prompt.vectors")).to(device)
        weights = {name.removeprefix("model."): value for name, value in weights.items()}
    model = build_model(config, run_tokenizer(directory).vocab_size, device)
    if not any(name.endswith(".row_ptr") for name in weights):
        densify(model)
    load_weights(model, weights, str(directory))
    return model.eval(), prompt


def generate(config: GenerateConfig) -> str:
    """Return the prompt and its continuation."""
    assert config.init_from is not None
    directory = Path(config.init_from)
    device = resolve_device(config.device)
    model, prompt = load_run(directory, device)
    tokenizer = run_tokenizer(directory)
    ids = tokenizer.encode(config.prompt) or [tokenizer.eos_id]
    tokens = model.generate(
        torch.tensor([ids], device=device),
        config.max_new_tokens,
        config.temperature,
        config.top_p,
        stop_token=tokenizer.eos_id,
        generator=torch.Generator(device).manual_seed(config.seed),
        prompt=prompt if config.soft_prompt else None,
    )
    return tokenizer.decode(tokens[0].tolist())
