"""A model of Hugging Face as a run directory, which every verb takes as ``init_from``.

The run is a finished pre-training of no steps: ``config.yaml``, ``tokenizer.json``, one checkpoint, ``result.json``. It
has the standard parameterization. Which text its weights have seen is not known, and every run that starts from it
records that.
"""

from __future__ import annotations

import fnmatch
import glob
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sparsetrain.data import DataConfig, Tokenizer
from sparsetrain.errors import UserError, check_choice
from sparsetrain.files import typed_path
from sparsetrain.interop.fold import Plain, masked_share, narrowed, pattern_of, scale_queries, unfolded
from sparsetrain.interop.hf_check import same_logits, sample
from sparsetrain.interop.hf_config import USED_WIDTH, attention_factor, layout_of, model_config_of
from sparsetrain.interop.hf_files import (
    CONFIG,
    digest_of,
    read_settings,
    read_weights,
    source_directory,
    weight_files,
)
from sparsetrain.interop.layouts import Layout
from sparsetrain.interop.mask_file import SECTION, read_masks
from sparsetrain.interop.tensors import from_layout, masks_from_layout
from sparsetrain.models import Transformer
from sparsetrain.parameterization import Parameterization
from sparsetrain.runs.checkpoint import OptimizerTensors, save_checkpoint
from sparsetrain.runs.claim import claimed
from sparsetrain.runs.layout import CHECKPOINTS, TOKENIZER
from sparsetrain.runs.origin import UNKNOWN_TEXT, Origin
from sparsetrain.runs.provenance import commit, machine
from sparsetrain.runs.result import RunResult, finish
from sparsetrain.screen import say
from sparsetrain.sparsity import SparsityConfig, SparsityPattern, sparse_layers, sparsify
from sparsetrain.stages.config import PretrainConfig, as_plain, identify
from sparsetrain.stages.finished import skipped
from sparsetrain.stages.memory import memory_errors
from sparsetrain.stages.stage import overall_density

MASKS = ("auto", "zeros", "none")
BYTES = "bytes"
LEAST_ZEROS = 0.1
"""Share of zeros from which a matrix counts as sparse where no file has masks: a few zeros are chance."""

_LONGEST = 1024  # tokens of a sample in the recorded settings, which a run that starts from this one may change


@dataclass
class ImportConfig:
    """Make a run of a model of Hugging Face, which other verbs take as init_from.

    Args:
        source: a directory with ``config.json`` and ``model.safetensors``, or a name on the Hugging Face hub.
        run_dir: the run directory to write.
        revision: the branch, tag or commit on the hub.
        tokenizer: a ``tokenizer.json`` or a directory with one; null takes that of the source, ``bytes`` plain bytes.
        eos_token: the token of it that ends a document; null takes the one that its files name.
        masks: ``auto`` makes the layers sparse whose masks the source has in a file, or, where ``config.json`` has a
            ``sparsity_config`` without one, those with zeros; ``zeros`` takes the zeros of the weights; ``none`` makes
            all layers dense.
        sparsity: makes a dense model sparse: ``sparsity.pattern=magnitude`` keeps the largest weights.
        seed: seed of the masks that ``sparsity`` draws.
        verify: compare the logits with those of transformers, if it is installed.
    """

    source: str | None = None
    run_dir: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    eos_token: str | None = None
    masks: str = "auto"
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    seed: int = 0
    verify: bool = True

    def __post_init__(self) -> None:
        check_choice("masks", self.masks, MASKS)
        if self.source is None:
            raise UserError("source is missing: a directory of Hugging Face, or a name on its hub, source=DIR_OR_NAME")
        if self.run_dir is None:
            raise UserError("run_dir is missing: the run directory to write, run_dir=RUN")
        if self.seed < 0:
            raise UserError(f"seed={self.seed} must be at least 0")


def import_run(config: ImportConfig, console: Console | None = None) -> RunResult:
    """Write a run directory with the model of ``config.source``, and return its result.

    Raises:
        UserError: the source cannot be read, our transformers do not compute what it computes, or the directory holds
            another run.
    """
    console, started = console or Console(), time.monotonic()
    assert config.source is not None
    assert config.run_dir is not None
    source = source_directory(config.source, config.revision)
    settings, files = read_settings(source), weight_files(source)
    layout = layout_of(settings, str(source / CONFIG))
    tokenizer = _tokenizer(config, source)
    with memory_errors("this import"):
        plain = read_model(source, settings, files, layout)
        if plain.config.vocab_size < tokenizer.vocab_size:
            raise UserError(
                f"source={source}: its tokenizer has {tokenizer.vocab_size} tokens and its embedding only "
                f"{plain.config.vocab_size}; give the right one, tokenizer=FILE"
            )
        plain.masks = _masks(config, source, settings, layout, plain)
        plain = without_padding(plain, settings)
        model = unfolded(plain)
        difference = _compared(model, source, tokenizer, plain) if config.verify else None
        section = _section(config, plain)
        if config.sparsity.is_sparse:
            sparsify(model, plan=section, seed=config.seed)
        run = _settings(config, plain, section)
        origin = Origin("unknown", digest_of(files, settings), tokenizer, {UNKNOWN_TEXT})
        directory = Path(config.run_dir)
        with claimed(directory, identify("pretrain", run, origin), origin) as done:
            if done is not None:
                return skipped(done, console)
            origin.save(directory)
            state = model.state_dict()
            save_checkpoint(directory / CHECKPOINTS, 0, state, OptimizerTensors({}, []), {}, keep_last=1)
            values = _result(config, layout, plain, model, run, difference)
            result = finish(directory, {**values, "seconds": time.monotonic() - started})
    _report(console, result, layout, plain, model, difference)
    return result


def import_model(config: ImportConfig) -> None:
    """Import a model and print where its run is."""
    console = Console()
    say(console, f"run directory: {import_run(config, console).directory}")


def read_model(source: Path, settings: Mapping[str, Any], files: list[Path], layout: Layout) -> Plain:
    """Return the model of a directory, without masks.

    Raises:
        UserError: our transformers do not compute what it computes, or a tensor does not fit.
    """
    config = model_config_of(settings, str(source / CONFIG))
    plain = from_layout(read_weights(files), layout, config, f"source={source}")
    factors = [attention_factor(settings, plain.config, block) for block in range(plain.config.n_layers)]
    for block, factor in enumerate(factors):
        scale_queries(plain.tensors, plain.config, block, factor)
    if any(factor != 1.0 for factor in factors):
        plain.notes.append("Its attention scale is multiplied into the queries.")
    return plain


def without_padding(plain: Plain, settings: Mapping[str, Any]) -> Plain:
    """Return a model without the zeros by which our own export widened its MLPs."""
    used = settings.get(USED_WIDTH)
    if isinstance(used, bool) or not isinstance(used, int) or not 0 < used < plain.config.ffn_width:
        return plain
    return narrowed(plain, used)


def _tokenizer(config: ImportConfig, source: Path) -> Tokenizer:
    if config.tokenizer == BYTES:
        return Tokenizer.bytes()
    try:
        place = source if config.tokenizer is None else typed_path(config.tokenizer, "tokenizer")
        return Tokenizer.load(place, config.eos_token)
    except UserError as error:
        given = f"tokenizer={config.tokenizer}" if config.tokenizer is not None else f"source={source}: its tokenizer"
        reason = str(error).removeprefix("data.").removeprefix("tokenizer_path=").replace("data.eos_token", "eos_token")
        raise UserError(f"{given} cannot be used: {reason}; another one is given by tokenizer=FILE") from None


def _masks(
    config: ImportConfig, source: Path, settings: Mapping[str, Any], layout: Layout, plain: Plain
) -> dict[str, SparsityPattern]:
    """Return the masks of our layers that the source has, in the way that the settings ask for."""
    if config.masks == "none":
        return {}
    found: dict[str, SparsityPattern] = {}
    if config.masks == "auto":
        read = read_masks(source, settings)
        found = masks_from_layout(read, layout, plain.config, f"source={source}")
        _check_outside(found, plain, source)
    if config.masks == "zeros" or (not found and settings.get(SECTION) is not None):
        found = _zeros(plain)
    if found and config.sparsity.is_sparse:
        raise UserError(
            f"sparsity.sparsity={config.sparsity.sparsity}: source={source} has masks of its own; with masks=none it "
            "is imported dense, and then made sparse"
        )
    return found


def _zeros(plain: Plain) -> dict[str, SparsityPattern]:
    found = {}
    for name, tensor in plain.tensors.items():
        layer = name.removesuffix(".weight")
        if fnmatch.fnmatch(layer, "blocks.*.*.*") and name.endswith(".weight"):
            mask = tensor != 0
            if float(mask.double().mean()) <= 1.0 - LEAST_ZEROS:
                found[layer] = pattern_of(mask, (1, 1))
    return found


def _check_outside(masks: Mapping[str, SparsityPattern], plain: Plain, source: Path) -> None:
    """Refuse masks that would remove weights, since the function would be another one."""
    for name, pattern in masks.items():
        weight: Tensor = plain.tensors[f"{name}.weight"]
        removed = int((weight[~pattern.mask()] != 0).sum())
        if removed:
            raise UserError(
                f"source={source}: {removed} weights of {name} are not zero where its mask file has zeros; masks=zeros "
                "takes the zeros of the weights, masks=none makes all layers dense"
            )


def _compared(model: Transformer, source: Path, tokenizer: Tokenizer, plain: Plain) -> float | None:
    told = f"source={source}: transformers computes other logits than the model that was read"
    ids = sample(tokenizer, plain.config.max_context)
    return same_logits(model, source, ids, told, "verify=false imports it anyway")


def _section(config: ImportConfig, plain: Plain) -> SparsityConfig:
    """Return the section of settings that describes the masks of the run."""
    if config.sparsity.is_sparse:
        return replace(config.sparsity, seed=config.sparsity.seed if config.sparsity.seed is not None else config.seed)
    if not plain.masks:
        return SparsityConfig()
    matrices = sum(name.startswith("blocks.") and tensor.ndim == 2 for name, tensor in plain.tensors.items())
    every = matrices == len(plain.masks)
    include = ["*"] if every else [glob.escape(name) for name in plain.masks]
    return SparsityConfig(sparsity=round(masked_share(plain.masks), 6), include=include, seed=config.seed)


def _settings(config: ImportConfig, plain: Plain, section: SparsityConfig) -> PretrainConfig:
    """Return the settings of the run; what a training would have set stays at its default."""
    assert config.run_dir is not None
    model = asdict(plain.config)
    for name in ("sparsity", "sparsity_pattern", "seed"):  # the run's own sections have them
        del model[name]
    return PretrainConfig(
        model=model,
        data=DataConfig(
            tokenizer_path=str(Path(config.run_dir) / TOKENIZER), context=min(plain.config.max_context, _LONGEST)
        ),
        sparsity=section,
        parameterization=Parameterization.sp(),
        seed=config.seed,
        run_dir=config.run_dir,
    )


def _result(
    config: ImportConfig,
    layout: Layout,
    plain: Plain,
    model: Transformer,
    run: PretrainConfig,
    difference: float | None,
) -> dict[str, Any]:
    return {
        "stage": "pretrain",
        "status": "complete",
        "imported": {
            "source": config.source,
            "revision": config.revision,
            "layout": layout.name,
            "notes": plain.notes,
            "logit_difference": difference,
        },
        "parameterization": run.parameterization.scheme,
        "sparsity": run.sparsity.sparsity,
        "density": overall_density(model),
        "width": plain.config.d_model,
        "depth": plain.config.n_layers,
        "seed": run.seed,
        "steps": 0,
        "samples": 0,
        "tokens": 0,
        "machine": machine(torch.device("cpu")),
        "commit": commit(),
        "model": asdict(model.config),
        "config": as_plain(run),
    }


def _report(
    console: Console, result: RunResult, layout: Layout, plain: Plain, model: Transformer, difference: float | None
) -> None:
    for note in plain.notes:
        say(console, f"note: {note}")
    say(console, "note: which text the model has seen is not known; an overlap with a task's test set is not reported.")
    sparse = dict(sparse_layers(model))
    masked = f"{len(sparse)} sparse layers, hidden density {result.values['density']:.4g}" if sparse else "dense"
    measured = "not compared" if difference is None else f"logits differ by at most {difference:.1e}"
    say(
        console,
        f"imported: {layout.architecture}, {plain.parameters():,} parameters, {masked}, {measured}",
    )
