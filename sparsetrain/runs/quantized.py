"""A quantized model as a directory: written completely or not at all, and verified before use.

    DIR/
        model.safetensors    codes, scales, offsets, packed indices, and the tensors that were not quantized
        config.json          format, shape of the model, its multipliers, and the form of each layer
        manifest.json        size and SHA-256 of each file, and a digest of the manifest itself
        tokenizer.json, quantization.json    of a run that ``sparsetrain quantize`` read: its tokenizer, and the report

The loaded model computes with the same numbers as the saved one, so its logits are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sparsetrain import wrappers
from sparsetrain.errors import UserError
from sparsetrain.files import whole_directory
from sparsetrain.models.config import ModelConfig
from sparsetrain.models.transformer import Block, Transformer
from sparsetrain.quantization.codes import BITS, SCALES
from sparsetrain.quantization.layers import (
    PackedMatrix,
    Quantized,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedSparseLinear,
)
from sparsetrain.quantization.quantize import quantized_layers
from sparsetrain.reading import parse_json
from sparsetrain.runs.manifest import MANIFEST, RefusedError, canonical, read_file, read_manifest, seal
from sparsetrain.shapes import Positive
from sparsetrain.sparsity import sparse_layers

FORMAT = 1
MODEL, CONFIG, REPORT = "model.safetensors", "config.json", "quantization.json"
_STEP = 0  # the manifest's field for it; a quantized model is of no step
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Layer(TypedDict):
    kind: str  # linear, embedding or sparse
    matrix: str  # the first layer that holds its codes
    shape: list[Positive]
    bits: int
    group: Positive
    dtype: str
    bias: bool
    index_bytes: NotRequired[Positive]
    nnz: NotRequired[Positive]
    gap_bits: NotRequired[Positive]
    block: NotRequired[list[Positive]]


class _Multipliers(TypedDict):
    attention: float
    embedding: float
    logit: float
    residual: float


class _Document(TypedDict):
    format: int
    model: dict[str, Any]
    multipliers: _Multipliers
    layers: dict[str, _Layer]


def save_quantized(model: nn.Module, path: str | Path) -> None:
    """Write a `sparsetrain.Transformer` that `sparsetrain.quantize` has quantized into the new directory ``path``.

    Args:
        model: the model. path: the directory; its parents are created.

    Raises:
        UserError: the model is no quantized `Transformer`, ``path`` exists, or the disk is full or not writable.
    """
    write_quantized(model, Path(path), {})


def write_quantized(model: nn.Module, path: Path, files: Mapping[str, bytes]) -> None:
    """Write a quantized model and further files, by name; raises `UserError` as `save_quantized` does."""
    model = wrappers.unwrap(model)
    layers = quantized_layers(model)
    if not isinstance(model, Transformer) or not layers:
        raise UserError("only a sparsetrain.Transformer that sparsetrain.quantize has quantized can be saved so")
    for name, _ in sparse_layers(model):
        raise UserError(f"{name} is sparse and not quantized; quantize the whole model")
    if path.exists():
        raise UserError(f"{path} exists already; a quantized model is written into a new directory")
    owners: dict[PackedMatrix, str] = {}
    for name, layer in layers.items():
        owners.setdefault(layer.matrix, name)
    residual = next((block.residual_scale for block in model.blocks if isinstance(block, Block)), 1.0)
    document = {
        "format": FORMAT,
        "model": asdict(model.config),
        "multipliers": {
            "attention": model.attention_scale,
            "embedding": model.embedding_scale,
            "logit": model.logit_scale,
            "residual": residual,
        },
        "layers": {name: _form(layer, owners[layer.matrix]) for name, layer in layers.items()},
    }
    shared = {f"{name}.matrix." for name, layer in layers.items() if owners[layer.matrix] != name}
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith(tuple(shared))
    }
    with whole_directory(path, sum(tensor.nbytes for tensor in state.values())) as working:
        safetensors.torch.save_file(state, working / MODEL)
        (working / MODEL).chmod(0o644)  # safetensors makes it readable for its owner alone
        for name, content in {CONFIG: canonical(document), **files}.items():
            (working / name).write_bytes(content)
        seal(working, _STEP, [MODEL, CONFIG, *files])


def _form(layer: Quantized, owner: str) -> dict[str, Any]:
    matrix = layer.matrix
    dtype = str(matrix.dtype).removeprefix("torch.")
    form: dict[str, Any] = {"matrix": owner, "bits": matrix.bits, "group": matrix.group, "dtype": dtype}
    form["bias"] = getattr(layer, "bias", None) is not None
    if isinstance(layer, QuantizedSparseLinear):
        shape, index = [layer.out_features, layer.in_features], layer.index.numel()
        block = {"nnz": layer.nnz, "index_bytes": index, "gap_bits": layer.gap_bits, "block": list(layer.block)}
        return {**form, "kind": "sparse", "shape": shape, **block}
    kind = "embedding" if isinstance(layer, QuantizedEmbedding) else "linear"
    return {**form, "kind": kind, "shape": [matrix.rows, matrix.columns]}


def is_quantized(path: Path) -> bool:
    """Whether a directory is one of a quantized model, intact or not."""
    return (path / CONFIG).is_file() and (path / MANIFEST).is_file()


def load_quantized(path: str | Path) -> Transformer:
    """Return the model of a directory that `save_quantized` wrote, on the CPU, in evaluation mode.

    Every byte of the files is compared with the manifest first; nothing is read through pickle.

    Raises:
        UserError: there is no such directory, a file is missing or damaged, or the format is a later one.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory")
    try:
        manifest = read_manifest(path, _STEP)
        files = {name: read_file(path, name, manifest) for name in {CONFIG, MODEL, *manifest["files"]}}
        document = parse_json(files[CONFIG], CONFIG, dict)
        if document.get("format") != FORMAT:
            raise RefusedError(f"it has format {document.get('format')!r}, but this version reads format {FORMAT}")
        return _restored(parse_json(files[CONFIG], CONFIG, _Document), safetensors.torch.load(files[MODEL]))
    except (RefusedError, UserError) as error:
        raise UserError(f"{path} is refused: {error}") from None
    except (SafetensorError, RuntimeError, AttributeError, TypeError, ValueError, LookupError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is refused: its files do not fit together: {reason}") from None


def _restored(document: _Document, tensors: dict[str, Tensor]) -> Transformer:
    config, scales = ModelConfig(**document["model"]), document["multipliers"]
    with torch.device("meta"):
        model = Transformer(replace(config, sparsity=0.0, seed=None))
    model.config = config
    model.attention_scale, model.embedding_scale = scales["attention"], scales["embedding"]
    model.logit_scale = scales["logit"]
    for block in model.blocks:
        assert isinstance(block, Block)
        block.attn.scale, block.residual_scale = scales["attention"], scales["residual"]
    made: dict[str, Quantized] = {}
    for name, form in document["layers"].items():
        owner = made.get(form["matrix"])
        made[name] = _layer(form, None if owner is None else owner.matrix)
        wrappers.replace_module(model, name, made[name])
        for key in [key for key in tensors if form["matrix"] != name and key.startswith(f"{form['matrix']}.matrix.")]:
            tensors[f"{name}{key.removeprefix(form['matrix'])}"] = tensors[key]
    for name, expected in model.state_dict().items():
        if name in tensors and expected.dtype in (torch.uint8, SCALES) and tensors[name].dtype != expected.dtype:
            raise RefusedError(f"{name} has the type {tensors[name].dtype}, not {expected.dtype}")
    model.load_state_dict(tensors, assign=True)
    for name, layer in made.items():
        if isinstance(layer, QuantizedSparseLinear):
            try:
                layer.check()
            except UserError as error:
                raise RefusedError(f"{name}: {error}") from None
    model.requires_grad_(False)
    return model.eval()


def _layer(form: _Layer, matrix: PackedMatrix | None) -> Quantized:
    """Return a layer whose tensors have shapes and no memory; ``matrix`` is that of the layer it shares codes with."""
    if form["bits"] not in BITS or form["dtype"] not in _DTYPES or len(form["shape"]) != 2:
        raise RefusedError(f"{CONFIG} has a layer of bits={form['bits']}, dtype={form['dtype']}, shape={form['shape']}")
    rows, columns = form["shape"]
    sparse = form["kind"] == "sparse"
    if matrix is None:
        shape = (1, form["nnz"]) if sparse else (rows, columns)
        matrix = PackedMatrix(*shape, form["bits"], form["group"], _DTYPES[form["dtype"]], "meta")
    bias = nn.Parameter(torch.empty(rows, device="meta")) if form["bias"] else None
    if form["kind"] == "embedding":
        return QuantizedEmbedding(matrix)
    if sparse:
        index = torch.empty(form["index_bytes"], dtype=torch.uint8, device="meta")
        bh, bw = form["block"]
        return QuantizedSparseLinear(matrix, index, form["gap_bits"], (rows, columns), (bh, bw), bias)
    if form["kind"] != "linear":
        raise RefusedError(f"{CONFIG} has a layer of the kind {form['kind']}")
    return QuantizedLinear(matrix, bias)
