"""LoRA adapters of peft on sparse layers.

The base layer stays sparse and frozen. The update of a merged adapter is a dense matrix, so merging puts a dense layer
in the place of the sparse one, and unmerging brings the sparse one back, bit for bit.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from sparsetrain.errors import UserError
from sparsetrain.interop.pretrained import wrap
from sparsetrain.sparsity import SparseLinear
from sparsetrain.sparsity.layers.foreign import give_back, is_conv1d
from sparsetrain.sparsity.layers.surgery import sparse_layers

# Ways to start an adapter that leave the weights of the base as they are.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


class SparseLoraLinear(Linear):
    """A `SparseLinear` with LoRA adapters: ``y = sparse(x) + scaling * B(A(dropout(x)))``."""

    _sparse: tuple[SparseLinear, ...] = ()  # the base layer while adapters are merged; in a tuple, so not as a module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fan_in_fan_out = False  # the dense matrix is [out, in], whatever layer the sparse one replaced

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, SparseLinear)
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None}  # DoRA and its relatives compute with the weights of the base

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        start = getattr(kwargs.get("config"), "init_lora_weights", kwargs.get("init_lora_weights", True))
        if start not in _STARTS:
            allowed = ", ".join(map(str, _STARTS))
            raise UserError(
                f"init_lora_weights={start!r} would change the weights of a sparse base layer; allowed are {allowed}"
            )
        super().update_layer(*args, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the sparse base layer by a dense one that has the adapters' updates added.

        Raises:
            ValueError: with ``safe_merge``, if the weights would not be finite. Nothing is then changed.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A]
        if not names:
            return
        base: Any = self.base_layer
        dense: Any = base
        if not self._sparse:  # a base that `densify` made dense is copied, since it comes back
            dense = give_back(base) if isinstance(base, SparseLinear) else copy.deepcopy(base)
        weight: Tensor = dense.weight.detach().clone()
        bias: Tensor | None = None if dense.bias is None else dense.bias.detach().clone()
        for name in names:
            update = self.get_delta_weight(name).to(weight.dtype)
            weight += update.t() if is_conv1d(dense) else update
            extra: Any = self.lora_B[name].bias
            if extra is not None:
                if bias is None:
                    raise RuntimeError("lora_bias=True cannot be merged: the base layer has no bias")
                bias += extra * self.scaling[name]
        if safe_merge and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
            raise ValueError(f"the merged weights would not be finite: adapter {names[0]} seems to be broken")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            dense.bias = nn.Parameter(bias, requires_grad=False)
        self._sparse, self.base_layer = self._sparse or (base,), dense
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Bring the sparse base layer back."""
        if self._sparse:
            self.base_layer, self._sparse = self._sparse[0], ()
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return f"lora.{nn.Module.__repr__(self)}"


def serve_sparse_layers(model: ModuleType) -> None:
    """Let ``peft.tuners.lora.model.LoraModel`` adapt sparse layers, and count them as linear layers."""
    wrap(model.LoraModel, "_create_new_module", _creating)
    utils = sys.modules["peft.tuners.tuners_utils"]
    wrap(utils, "_maybe_include_all_linear_layers", _including)


def _creating(create: Callable[..., Any]) -> Callable[..., Any]:
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
        layer = getattr(target, "base_layer", target)
        if isinstance(layer, SparseLinear):
            lora_config = copy.copy(lora_config)
            lora_config._custom_modules = {SparseLinear: SparseLoraLinear, **(lora_config._custom_modules or {})}
        return create(lora_config, adapter_name, target, **kwargs)

    return _create_new_module


def _including(include: Callable[..., Any]) -> Callable[..., Any]:
    def _maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
        typed = peft_config.target_modules
        config = include(peft_config, model)
        if isinstance(typed, str) and typed.lower() == "all-linear":
            config.target_modules = {*config.target_modules, *(name for name, _ in sparse_layers(model))}
        return config

    return _maybe_include_all_linear_layers
