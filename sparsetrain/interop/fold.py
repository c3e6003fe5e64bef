"""A transformer without multipliers: the same function, with everything that a parameterization multiplies in weights.

Other libraries compute ``softmax(q k^T / sqrt(d_head))``, add branches as they are, and multiply neither embeddings nor
logits. So the multipliers go where they do not change the function:

* attention scale s: the rows of queries, times ``s sqrt(d_head)``;
* residual multiplier r: the output projections of both branches, with their biases, times r;
* alpha_in: the embedding and the positions;
* alpha_out / m_d: the head. If the head shares the embedding's matrix, the final norm gets
  ``alpha_out / (m_d alpha_in)`` instead, which undoes what alpha_in did to the shared matrix.

Each factor meets a weight once, in float64. Zeros stay zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparsetrain import wrappers
from sparsetrain.models import ModelConfig, Transformer
from sparsetrain.models.transformer import Block
from sparsetrain.sparsity import SparseLinear, SparsityPattern, sparse_layers, sparsify

OUTPUTS = ("attn.out", "mlp.down")


@dataclass
class Plain:
    """A transformer whose multipliers are all 1: its configuration, tensors and masks.

    Args:
        config: shape and components; its sparsity is 0.
        tensors: dense float32 weights, by the names of a dense `Transformer`; a tied head has none.
        masks: ``[out_features, in_features]`` by layer name, of the layers that are sparse.
        notes: sentences about what was folded, for a reader.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    masks: dict[str, SparsityPattern] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def parameters(self) -> int:
        """Return the number of weights, with the zeros, a shared matrix once."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def folded(model: Transformer) -> Plain:
    """Return a model without multipliers; the tensors are copies, on the CPU."""
    config = replace(model.config, sparsity=0.0, dropout=0.0)
    tensors = dense_tensors(model)
    plain = Plain(config, tensors, {name: layer.pattern.to("cpu") for name, layer in sparse_layers(model)})
    _fold_attention(plain, model.attention_scale)
    first = model.blocks[0]
    block = wrappers.unwrap(first)
    assert isinstance(block, Block)
    _fold_branches(plain, block.residual_scale)
    _fold_ends(plain, model.embedding_scale, model.logit_scale)
    return plain


def unfolded(plain: Plain, backend: str = "auto") -> Transformer:
    """Return the transformer, under the standard parameterization, with sparse layers where there are masks."""
    with torch.device("meta"):
        model = Transformer(plain.config)
    tensors = dict(plain.tensors)
    if plain.config.tie_embeddings:
        tensors["head.weight"] = tensors["embed.weight"]
    model.load_state_dict(tensors, assign=True)
    if plain.config.tie_embeddings:
        model.head.weight = model.embed.weight
    if plain.masks:
        sparsify(model, masks=plain.masks, backend=backend)
    return model.eval()


def dense_tensors(model: Transformer) -> dict[str, Tensor]:
    """Return copies of the weights of a model in float32, by their names in the dense model; a tied head has none."""
    found = {}
    for name, module in wrappers.named_modules(model):
        for leaf, parameter in module.named_parameters(recurse=False):
            values = parameter.detach().to("cpu", torch.float32)
            if isinstance(module, SparseLinear) and leaf == "values":
                leaf, values = "weight", module.pattern.to("cpu").scatter(values)
            found[f"{name}.{leaf}"] = values.clone()
    if model.config.tie_embeddings:
        found.pop("head.weight", None)
    return found


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """Return a tensor times a number, rounded once."""
    return tensor if factor == 1.0 else (tensor.double() * factor).to(tensor.dtype)


def scale_queries(tensors: dict[str, Tensor], config: ModelConfig, block: int, factor: float) -> None:
    """Multiply the queries of a block by a number."""
    rows = config.n_heads * config.d_head
    for leaf in ("weight", "bias"):
        qkv = tensors.get(f"blocks.{block}.attn.qkv.{leaf}")
        if qkv is not None and factor != 1.0:
            qkv[:rows] = scaled(qkv[:rows], factor)


def _fold_attention(plain: Plain, scale: float) -> None:
    usual = plain.config.d_head**-0.5
    if math.isclose(scale, usual, rel_tol=1e-12):
        return
    for block in range(plain.config.n_layers):
        scale_queries(plain.tensors, plain.config, block, scale / usual)
    plain.notes.append(f"The attention scale {scale:.6g} (usual: {usual:.6g}) is multiplied into the queries.")


def _fold_branches(plain: Plain, multiplier: float) -> None:
    if multiplier == 1.0:
        return
    for block in range(plain.config.n_layers):
        for output in OUTPUTS:
            _multiply(plain.tensors, f"blocks.{block}.{output}", multiplier)
    plain.notes.append(f"The residual multiplier {multiplier:.6g} is multiplied into the output projections.")


def _fold_ends(plain: Plain, into: float, out: float) -> None:
    tensors, tied = plain.tensors, plain.config.tie_embeddings
    if into != 1.0:
        _multiply(tensors, "embed", into)
        _multiply(tensors, "positions", into)
        plain.notes.append(f"alpha_in = {into:.6g} is multiplied into the embeddings.")
    factor = out / into if tied else out
    if factor != 1.0:
        _multiply(tensors, "final_norm" if tied else "head", factor)
        undone = f" / alpha_in = {factor:.6g}" if into != 1.0 else ""
        place = "final norm, whose output meets the embeddings in the head" if tied else "head"
        plain.notes.append(f"alpha_out / m_d = {out:.6g}{undone if tied else ''} is multiplied into the {place}.")


def _multiply(tensors: dict[str, Tensor], layer: str, factor: float) -> None:
    """Multiply the weight and the bias of a layer, as far as it has them."""
    for name in (f"{layer}.weight", f"{layer}.bias"):
        if name in tensors:
            tensors[name] = scaled(tensors[name], factor)


def padded(plain: Plain, width: int) -> Plain:
    """Return the same function with ``width`` features inside the MLPs; the new ones are zeros that no mask keeps."""
    extra = width - plain.config.ffn_width
    tensors, masks = dict(plain.tensors), dict(plain.masks)
    for block in range(plain.config.n_layers):
        up, down = f"blocks.{block}.mlp.up", f"blocks.{block}.mlp.down"
        rows, columns = (0, 0, 0, extra), (0, extra)
        for name, sides in ((f"{up}.weight", rows), (f"{up}.bias", columns), (f"{down}.weight", columns)):
            if name in tensors:
                tensors[name] = torch.nn.functional.pad(tensors[name], sides)
        for name, sides in ((up, rows), (down, columns)):
            if name in masks:
                masks[name] = pattern_of(torch.nn.functional.pad(masks[name].mask(), sides), masks[name].block)
    note = f"The MLPs have {plain.config.ffn_width} features; {extra} features of zeros bring them to {width}."
    return Plain(replace(plain.config, d_ff=width), tensors, masks, [*plain.notes, note])


def narrowed(plain: Plain, width: int) -> Plain:
    """Return the same function with the first ``width`` features inside the MLPs, if all others are zeros.

    The model is returned as it is, if they are not.
    """
    tensors, masks = dict(plain.tensors), dict(plain.masks)
    for block in range(plain.config.n_layers):
        up, down = f"blocks.{block}.mlp.up", f"blocks.{block}.mlp.down"
        for name, columns in ((f"{up}.weight", False), (f"{up}.bias", False), (f"{down}.weight", True)):
            if name in tensors:
                kept, rest = tensors[name].split((width, plain.config.ffn_width - width), dim=1 if columns else 0)
                if bool(rest.any()):
                    return plain
                tensors[name] = kept.contiguous()
        for name, part in ((up, (slice(width), slice(None))), (down, (slice(None), slice(width)))):
            if name in masks:
                masks[name] = pattern_of(masks[name].mask()[part], masks[name].block)
    return Plain(replace(plain.config, d_ff=width), tensors, masks, plain.notes)


def pattern_of(mask: Tensor, block: tuple[int, int]) -> SparsityPattern:
    """Return the pattern of a mask, in blocks if they fit it."""
    rows, columns = mask.shape
    if rows % block[0] or columns % block[1]:
        return SparsityPattern.from_mask(mask)
    tiles = mask.reshape(rows // block[0], block[0], columns // block[1], block[1])
    whole = torch.equal(tiles.any(3).any(1), tiles.all(3).all(1))
    return SparsityPattern.from_mask(mask, block if whole else (1, 1))


def masked_share(masks: Mapping[str, SparsityPattern]) -> float:
    """Return the zeros of masks divided by the elements of their layers; 0 without masks."""
    elements = sum(pattern.shape[0] * pattern.shape[1] for pattern in masks.values())
    return 1.0 - sum(pattern.nnz for pattern in masks.values()) / elements if elements else 0.0
