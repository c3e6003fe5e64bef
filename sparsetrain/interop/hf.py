"""A run as a directory of Hugging Face: ``AutoModelForCausalLM.from_pretrained(DIR)`` loads it with no code of ours.

DIR/
    config.json, generation_config.json     the class of transformers, and `sparsetrain.interop.mask_file`'s section
    model.safetensors                       float32 weights, with zeros in place; a tied head is not repeated
    tokenizer.json, tokenizer_config.json   for AutoTokenizer
    masks.npz                               of a sparse model: a bit for each element of each sparse matrix
    README.md                               how to load it, and what was folded into the weights
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console

from sparsetrain.data import Tokenizer
from sparsetrain.errors import UserError, check_choice
from sparsetrain.files import typed_path, whole_directory
from sparsetrain.interop.fold import folded
from sparsetrain.interop.hf_card import card
from sparsetrain.interop.hf_check import same_logits, sample
from sparsetrain.interop.hf_config import config_json
from sparsetrain.interop.hf_tokenizer import tokenizer_files
from sparsetrain.interop.layouts import LAYOUTS, choose
from sparsetrain.interop.mask_file import SECTION, write_masks
from sparsetrain.interop.peft_prompt import save_peft_prompt
from sparsetrain.interop.tensors import to_layout
from sparsetrain.models import SoftPrompt, Transformer
from sparsetrain.runs.origin import run_tokenizer
from sparsetrain.runs.quantized import is_quantized
from sparsetrain.screen import say
from sparsetrain.stages.generate import Adjusted, load_run, run_config
from sparsetrain.stages.memory import memory_errors

FORMATS = ("hf",)


@dataclass
class ExportConfig:
    """Write the model of a run for another library.

    Args:
        init_from: the run directory: a pre-training, an adaptation, a fine-tuning, or a prompt. A prompt in front of
            the text becomes an adapter of peft in ``prompt/``; one between source and answer is left out.
        output: the directory to write; it must not exist, or be empty.
        format: ``hf``, a directory that ``AutoModelForCausalLM.from_pretrained`` of Hugging Face loads.
        layout: the class of transformers: ``gpt2``, ``llama``, ``mpt``, ``bloom``, ``gpt_neox``, ``starcoder2`` or
            ``stablelm``; null takes the first that holds the model.
        model: settings of the model that may be changed.
        verify: load the directory with transformers, if it is installed, and compare the logits before it is kept.
    """

    init_from: str | None = None
    output: str | None = None
    format: str = "hf"
    layout: str | None = None
    model: Adjusted = field(default_factory=Adjusted)
    verify: bool = True

    def __post_init__(self) -> None:
        check_choice("format", self.format, FORMATS)
        if self.layout is not None:
            check_choice("layout", self.layout, LAYOUTS)
        if self.init_from is None:
            raise UserError("init_from is missing: the run directory to export, init_from=RUN_DIR")
        if self.output is None:
            raise UserError("output is missing: the directory to write, output=DIR")


@dataclass(frozen=True)
class Exported:
    """A directory that was written.

    Args:
        directory: it.
        layout: the class of transformers.
        parameters: weights of the model, with the zeros; a shared matrix counts once.
        nonzeros: the weights that no mask makes zero.
        difference: largest difference of a logit between the model and what transformers loads; None if not measured.
        notes: what was folded into the weights, and what was left out.
    """

    directory: Path
    layout: str
    parameters: int
    nonzeros: int
    difference: float | None
    notes: Sequence[str]


def export(config: ExportConfig) -> None:
    """Write the model of a run for another library; see `export_run`."""
    export_run(config)


def export_run(config: ExportConfig, console: Console | None = None) -> Exported:
    """Write the model of a run, and print what was written.

    Raises:
        UserError: there is no such run, no layout holds its model, the directory is taken, or the loaded model differs.
    """
    console = console or Console()
    assert config.init_from is not None
    assert config.output is not None
    directory, output = Path(config.init_from), new_directory(config.output)
    if is_quantized(directory):
        raise UserError(f"init_from={directory} is quantized; export the run that it was made from")
    settings = run_config(directory)
    with memory_errors("this export"):
        changes = {name: value for name, value in asdict(config.model).items() if value is not None}
        model, prompt = load_run(directory, torch.device("cpu"), changes)
        pattern = settings.sparsity.pattern if settings.sparsity.is_sparse else None
        notes = []
        if prompt is not None:
            n, front = len(prompt.vectors), "in front of the text: prompt/ is an adapter of peft with them."
            lost = "between source and answer, which is left out: the model here reads text without it."
            notes.append(f"The run has a soft prompt of {n} vectors {front if prompt.front else lost}")
        found = write_model(
            *(model, run_tokenizer(directory), output, config.layout),
            name=directory.absolute().name,
            notes=notes,
            pattern=pattern,
            verify=config.verify,
            prompt=prompt if prompt is not None and prompt.front else None,
        )
    for note in found.notes:
        say(console, f"note: {note}")
    measured = "not compared" if found.difference is None else f"logits differ by at most {found.difference:.1e}"
    say(
        console,
        f"exported: {found.directory}, {LAYOUTS[found.layout].architecture}, {found.parameters:,} parameters, "
        f"{found.nonzeros:,} nonzeros, {measured}",
    )
    return found


def new_directory(name: str) -> Path:
    """Return the path of a directory that does not exist, or is empty.

    Raises:
        UserError: it is a file, or holds something.
    """
    path = typed_path(name, "output")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"output={path} exists and is not empty; choose another directory or delete that one")
    return path


def write_model(
    model: Transformer,
    tokenizer: Tokenizer,
    output: Path,
    layout: str | None = None,
    name: str = "model",
    notes: Sequence[str] = (),
    pattern: str | None = None,
    verify: bool = True,
    prompt: SoftPrompt | None = None,
) -> Exported:
    """Write a model as a directory of Hugging Face, whole or not at all.

    Args:
        name, notes: for its README.
        pattern: name of the pattern by which the masks were drawn.
        verify: compare the logits with those of transformers, if it is installed.
        prompt: a soft prompt in front of the text, to write as an adapter of peft in ``prompt/``.

    Raises:
        UserError: no layout holds the model, or transformers computes something else from the directory.
    """
    plain = folded(model)
    chosen = choose(plain.config, layout)
    width = plain.config.ffn_width
    tensors, masks, plain = to_layout(plain, chosen)
    content, more = config_json(plain.config, chosen, tokenizer.eos_id, width)
    notes = [*plain.notes, *more, *notes]
    ids = sample(tokenizer, plain.config.max_context)
    difference = None
    parameters = sum(tensor.numel() for tensor in tensors.values())  # also the weights that only the layout has
    nonzeros = parameters - sum(mask.shape[0] * mask.shape[1] - mask.nnz for mask in masks.values())
    with whole_directory(output, needed_bytes=4 * parameters) as directory:
        if masks:
            content[SECTION] = write_masks(directory, masks, parameters, pattern)
        weights = directory / "model.safetensors"
        safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
        weights.chmod(0o644)
        _write(directory / "config.json", content)
        generation = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
        _write(directory / "generation_config.json", {**generation, "pad_token_id": tokenizer.eos_id})
        tokenizer_files(tokenizer, directory, plain.config.max_context)
        if prompt is not None:
            save_peft_prompt(prompt, directory / "prompt", model, base=str(output.absolute()))
        if verify:
            told = "transformers computes other logits from the exported model"
            anyway = "nothing is written (verify=false writes it anyway)"
            difference = same_logits(model, directory, ids, told, anyway)
        found = Exported(output, chosen.name, parameters, nonzeros, difference, notes)
        text = card(name, chosen, plain.config, found, content.get(SECTION))
        (directory / "README.md").write_text(text, encoding="utf-8")
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
