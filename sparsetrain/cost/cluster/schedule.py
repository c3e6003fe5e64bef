"""The seconds of one training step on several devices, by term.

One micro-batch passes through the stages; the stage that takes longest sets the pace, and the time in which it waits
for the others is the bubble: ``(p - 1) / (v m)`` of the step if the p stages are equal, each of v chunks, with m
micro-batches (arXiv 2104.04473, section 2.2). Tensor parallelism divides every product by t, and adds a reduction of
the activations after attention and after the MLP (arXiv 1909.08053); with sequence parallelism each is a
reduce-scatter and a later all-gather (arXiv 2205.05198). Replicas add up their gradients once a step, or, with weights
shared by them, gather the weights for each pass and scatter the gradients of each micro-batch (arXiv 1910.02054).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sparsetrain.cost.cluster.links import Group, group
from sparsetrain.cost.cluster.parallelism import FULL, SELECTIVE, UNFUSED, Parallelism, check_split
from sparsetrain.cost.cluster.streaming import streamed_terms
from sparsetrain.cost.hardware import Machine
from sparsetrain.cost.operations import (
    ATTENTION,
    BACKWARD,
    EMBEDDING,
    FORWARD,
    HEAD,
    LINEAR,
    NORM,
    OPTIMIZER,
    SOFTMAX,
    UPDATE,
    Operation,
    step_operations,
)
from sparsetrain.cost.sizes import Layers, Number, Sizes, trained_weights
from sparsetrain.cost.timing import Setting, Terms, operation_terms

VALUE_BYTES: Mapping[str, float] = {"float32": 4.0, "tfloat32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0}
_ADAMW_BYTES_MIXED = 30.0  # reads gradient, master weight, two moments in float32; writes the last three and 16 bits
_ADAMW_BYTES = 28.0
_SOFTMAX_PASSES = {FORWARD: 4.5, BACKWARD: 5.5}  # over T x T of each head: softmax, dropout and its mask of one byte
_EMBED = "embed"
_ADDS = ("attn_add", "mlp_add")

_Seconds = dict[str, Number]


def cluster_terms(
    sizes: Sizes,
    context: Number,
    global_batch: Number,
    machine: Machine,
    parallelism: Parallelism,
    setting: Setting,
    layers: Sequence[Layers] | None = None,
) -> Terms:
    """Return the seconds of one training step, by term; they add up to the step.

    Every size may be an array, with one value for each configuration. The bubble is overhead.

    Args:
        sizes: the model.
        context: T.
        global_batch: sequences of a step, over all replicas.
        machine: one device, and its links to others.
        parallelism: how the step is divided.
        setting: how products are computed; its dtype is that of weights and activations in products.
        layers: blocks by density; None is dense.

    Raises:
        UserError: the step cannot be divided like this, or the machine's file lacks a rate or a link.
    """
    check_split(sizes, global_batch, parallelism)
    micro, count = parallelism.micro_batches(global_batch)
    step = _Step(sizes, context, micro, machine, parallelism, setting, layers)
    blocks, first, last = step.blocks(), step.embedding(), step.head()
    stages = parallelism.pipeline
    alone = np.asarray(stages) == 1
    middle = _scaled(blocks, 1.0 / stages)
    ends = [_plus(middle, part) for part in (first, last)]
    slowest = _larger(ends[0], ends[1])
    slowest = {term: np.where(alone, middle[term] + first[term] + last[term], slowest[term]) for term in slowest}
    passed = np.where(alone, _sum(slowest), stages * _sum(middle) + _sum(first) + _sum(last))
    total = _scaled(slowest, count)
    bubble = (passed - _sum(slowest)) / parallelism.interleave
    total["overhead"] = total["overhead"] + bubble
    for term, seconds in step.once(count).items():
        total[term] = total[term] + seconds
    return Terms(**total)


def weights_of_stages(sizes: Sizes, layers: Sequence[Layers] | None, parallelism: Parallelism) -> tuple[Number, Number]:
    """Return the weights on a device of the first and of the last stage; a tied embedding lies on both."""
    total = trained_weights(sizes, [Layers(sizes.layers)] if layers is None else layers)
    table, positions = sizes.vocabulary * sizes.width, sizes.positions * sizes.width
    norm = sizes.width * (2.0 if sizes.layernorm and sizes.biased else 1.0)
    outer = table * (1.0 if sizes.tied else 2.0) + positions + norm
    stages = np.asarray(parallelism.pipeline, dtype=float)
    blocks = (total - outer) / stages
    ends = (blocks + np.where(stages > 1, end, outer) for end in (table + positions, table + norm))
    first, last = (end / parallelism.tensor for end in ends)
    return first, last


@dataclass(frozen=True)
class _Step:
    """One micro-batch in its stages, and what happens once a step."""

    sizes: Sizes
    context: Number
    micro: Number
    machine: Machine
    parallelism: Parallelism
    setting: Setting
    layers: Sequence[Layers] | None
    _operations: list[Operation] = field(init=False)

    def __post_init__(self) -> None:
        value = VALUE_BYTES.get(self.setting.dtype, 4.0)
        found = step_operations(self.sizes, self.context, self.micro, self.layers, value_bytes=value, whole_logits=True)
        object.__setattr__(self, "_operations", [_share(each, self.parallelism) for each in found])

    @property
    def value_bytes(self) -> float:
        return VALUE_BYTES.get(self.setting.dtype, 4.0)

    @property
    def streams(self) -> bool:
        return self.machine.streamed

    def blocks(self) -> _Seconds:
        """Return the seconds of a micro-batch in all blocks, communication included."""
        inside = [each for each in self._operations if each.module.startswith("blocks.")]
        if self.parallelism.attention == UNFUSED:
            inside = [other for each in inside for other in self._unfused(each)]
        again = {FULL: lambda each: True, SELECTIVE: lambda each: each.module == "blocks.*.attn"}
        repeated = again.get(self.parallelism.recompute)
        seconds = self._add(inside)
        if repeated is not None:
            seconds = _plus(seconds, self._add(each for each in inside if each.phase == FORWARD and repeated(each)))
        seconds["communication"] = self._tensor_reductions(inside) + self._shared_weights(_sum(seconds)) + self._sends()
        return seconds

    def embedding(self) -> _Seconds:
        """Return the seconds of a micro-batch in the embedding."""
        seconds = self._add(each for each in self._operations if each.module == _EMBED)
        seconds["communication"] = self._activations(2.0 if self.parallelism.sequence else 1.0)
        return seconds

    def head(self) -> _Seconds:
        """Return the seconds of a micro-batch in the last norm, the head and the loss."""
        others = (_EMBED, "optimizer")
        outside = [each for each in self._operations if "*" not in each.module and each.module not in others]
        seconds = self._add(outside)
        hidden = self._half_of_products(each for each in outside if each.kind == HEAD)
        seconds["communication"] = self._activations(1.0 if self.parallelism.sequence else 0.0) + self._exposed(
            self._activations(2.0), hidden
        )
        return seconds

    def once(self, count: Number) -> _Seconds:
        """Return the seconds of the update, and of gradients and weights between replicas, after the micro-batches."""
        divided = self.parallelism
        weights = np.maximum(*weights_of_stages(self.sizes, self.layers, divided))
        owned = weights / divided.data if divided.zero >= 1 else weights
        each = _ADAMW_BYTES if self.value_bytes >= 4.0 else _ADAMW_BYTES_MIXED
        update = Operation(
            OPTIMIZER, UPDATE, "optimizer", 14.0 * owned, 14.0 * owned, each * owned, sizes={"elements": owned}
        )
        seconds = _empty()
        if self.streams:  # where the weights are kept, as the gradients arrive
            return seconds
        seconds = _plus(seconds, operation_terms(update, self.machine, self.setting))
        seconds["communication"] = self._between_replicas(weights, count)
        return seconds

    def _between_replicas(self, weights: Number, count: Number) -> Number:
        divided = self.parallelism
        if divided.zero >= 2:
            return 0.0
        replicas = self._replicas()
        gradients = divided.reduce_bytes * weights
        sharing = divided.zero >= 1
        reduced = replicas.reduce_scatter(gradients) if sharing else replicas.all_reduce(gradients)
        gathered: Number = replicas.all_gather(self.value_bytes * weights) if sharing else 0.0
        if not divided.overlap:
            return reduced + gathered
        # Gradients leave during the last backward pass; the weights arrive during the next forward pass.
        backward = self._share_of_stage(BACKWARD)
        forward = self._share_of_stage(FORWARD)
        return self._exposed(reduced, backward) + self._exposed(gathered, forward)

    def _shared_weights(self, busy: Number) -> Number:
        """Return the seconds of gathering weights and scattering gradients that computation does not hide."""
        divided = self.parallelism
        if divided.zero < 2:
            return 0.0
        replicas = self._replicas()
        weights = np.maximum(*weights_of_stages(self.sizes, self.layers, divided))
        gathered = replicas.all_gather(self.value_bytes * weights) * (2.0 if divided.zero == 3 else 1.0)
        moved = gathered + replicas.reduce_scatter(divided.reduce_bytes * weights)
        # `blocks` is divided among the stages, and so is what they communicate.
        moved = moved * divided.pipeline
        return self._exposed(moved, busy) if divided.overlap else moved

    def _tensor_reductions(self, inside: Iterable[Operation]) -> Number:
        """Return the seconds of reductions among the devices that share the matrices of all blocks.

        The backward pass of the products that are divided by their outputs needs them for the gradient of the input,
        and can compute the gradient of the weights meanwhile.
        """
        divided = self.parallelism
        passes = 2.0 if divided.recompute == FULL else 1.0
        blocks = self.sizes.layers
        # Two reductions a block: one all-reduce each, or a reduce-scatter and an all-gather.
        forward = 2.0 * passes * self._activations(2.0)
        gathered = 2.0 * self._activations(1.0) if divided.sequence else np.zeros(())
        hidden = self._half_of_products(each for each in inside if each.module.endswith((".qkv", ".gate", ".up")))
        return blocks * (forward + gathered) + self._exposed(blocks * 2.0 * self._activations(2.0), hidden)

    def _activations(self, times: float) -> Number:
        """Return the seconds of ``times`` all-gathers or reduce-scatters of a micro-batch's activations."""
        devices = group(self.machine, self.parallelism.tensor, 1.0)
        return times * devices.all_gather(self.value_bytes * self.micro * self.context * self.sizes.width)

    def _sends(self) -> Number:
        """Return the seconds of activations and gradients between stages, per micro-batch and for all stages."""
        divided = self.parallelism
        if np.all(np.asarray(divided.pipeline) == 1):
            return 0.0
        neighbours = group(self.machine, divided.pipeline, divided.tensor * divided.data)
        moved = self.value_bytes * self.micro * self.context * self.sizes.width
        moved = moved / divided.tensor  # each device of a stage sends its part
        return 2.0 * neighbours.send(moved) * divided.interleave * divided.pipeline

    def _replicas(self) -> Group:
        return group(self.machine, self.parallelism.data, self.parallelism.tensor)

    def _exposed(self, moved: Number, busy: Number) -> Number:
        """Return what is left of a communication beside a computation of ``busy`` seconds."""
        share = 1.0 if self.machine.overlap is None else self.machine.overlap.value
        return moved - share * np.minimum(moved, busy)

    def _half_of_products(self, products: Iterable[Operation]) -> Number:
        """Return half the seconds of backward products: the gradients of weights."""
        return 0.5 * _sum(self._add(each for each in products if each.phase == BACKWARD))

    def _share_of_stage(self, phase: str) -> Number:
        inside = (each for each in self._operations if each.phase == phase and each.kind != OPTIMIZER)
        return _sum(self._add(inside)) / self.parallelism.pipeline

    def _add(self, operations: Iterable[Operation]) -> _Seconds:
        total = _empty()
        machine = replace(self.machine, memory=self.machine.memory[:1]) if self.streams else self.machine
        for each in operations:
            if each.kind in machine.included:
                continue
            terms = operation_terms(each, machine, self.setting)
            if self.streams:  # activations stay where the arithmetic is
                terms = streamed_terms(each, terms, self.machine, self.value_bytes)
            for term, seconds in terms.items():
                total[term] = total[term] + each.count * seconds
        return total

    def _unfused(self, each: Operation) -> list[Operation]:
        """Return attention as two products per head, which write and read T x T values, and the softmax between."""
        if each.kind != ATTENTION:
            return [each]
        scores = self.micro * self.sizes.heads * self.context * self.context / self.parallelism.tensor
        moved = 2.0 * self.value_bytes * scores * (1.0 if each.phase == FORWARD else 2.0)
        at = {"width": np.sqrt(self.context * each.sizes["d_head"]), "tokens": self.context, "density": 1.0}
        softmax = Operation(
            SOFTMAX,
            each.phase,
            each.module,
            flops=0.0,
            dense_flops=0.0,
            bytes=_SOFTMAX_PASSES[each.phase] * self.value_bytes * scores,
            sizes={"elements": scores},
            count=each.count,
        )
        return [replace(each, kind=LINEAR, bytes=each.bytes + moved, sizes=at), softmax]


def _share(each: Operation, divided: Parallelism) -> Operation:
    """Return a device's share of an operation."""
    if each.kind == NORM or each.module.endswith(_ADDS) or each.kind == EMBEDDING:
        parts: Number = divided.tensor if divided.sequence else 1.0
    else:
        parts = divided.tensor
    sizes = dict(each.sizes)
    if "width" in sizes:
        sizes["width"] = sizes["width"] / np.sqrt(parts)
    if "elements" in sizes:
        sizes["elements"] = sizes["elements"] / parts
    return replace(
        each,
        flops=each.flops / parts,
        dense_flops=each.dense_flops / parts,
        bytes=each.bytes / parts,
        index_bytes=each.index_bytes / parts,
        sizes=sizes,
    )


def _empty() -> _Seconds:
    return dict.fromkeys(Terms.__dataclass_fields__, 0.0)


def _sum(seconds: Mapping[str, Number]) -> Number:
    return sum(seconds.values(), 0.0)


def _plus(these: Mapping[str, Number], others: Mapping[str, Number]) -> _Seconds:
    return {term: these.get(term, 0.0) + others.get(term, 0.0) for term in _empty()}


def _scaled(seconds: Mapping[str, Number], factor: Number) -> _Seconds:
    return {term: factor * value for term, value in seconds.items()}


def _larger(these: _Seconds, others: _Seconds) -> _Seconds:
    larger = np.asarray(_sum(these) >= _sum(others))
    return {term: np.where(larger, these[term], others[term]) for term in these}
