"""The bytes that the fullest device holds during a training step on several devices, in closed form.

Legend: N tokens of a micro-batch, D width, K width of all keys, F width of the MLP, A heads, T context, V vocabulary,
t devices that share every matrix, e bytes of a value. A block keeps, for its backward pass (arXiv 2205.05198,
equations 1, 2 and 4, of which the first is 34 N D + 5 A T N with e = 2, F = 4 D, K = D and dropout):

    2 (input and result of a norm) x 2 e N D, divided by t if the sequence is, too
    e N (D + 2 K) / t for queries, keys and values, e N D / t for the result of attention
    e N F (2, or 3 if gated) / t in the MLP
    attention: 4 N A / t if it is fused; (2 e + 1) A T N / t if it is not and drops out

With 16 bits a weight takes 2 bytes, its gradient 4, its float32 copy and two moments 12 (arXiv 1910.02054 counts 16 in
all, with a gradient of 2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from sparsetrain.cost.cluster.parallelism import FULL, SELECTIVE, UNFUSED, Parallelism, check_split
from sparsetrain.cost.cluster.schedule import VALUE_BYTES, weights_of_stages
from sparsetrain.cost.hardware import Machine
from sparsetrain.cost.sizes import Layers, Number, Sizes
from sparsetrain.cost.timing import Setting
from sparsetrain.errors import UserError


@dataclass(frozen=True)
class ClusterMemory:
    """Bytes on the fullest device by component; they add up to ``total``.

    Args:
        weights: as products use them. gradients: of the weights. optimizer: moments, and float32 copies of weights.
        activations: what the micro-batches in flight keep for their backward passes.
        working: the largest short-lived values: logits and their gradient, or those of one block's backward pass.
        placeholders: gradients in the shape of each matrix that an implementation hands out empty.
    """

    weights: Number = 0.0
    gradients: Number = 0.0
    optimizer: Number = 0.0
    activations: Number = 0.0
    working: Number = 0.0
    placeholders: Number = 0.0

    @property
    def total(self) -> Number:
        """The bytes at the peak."""
        return sum(asdict(self).values(), 0.0)


def cluster_memory(
    sizes: Sizes,
    context: Number,
    global_batch: Number,
    parallelism: Parallelism,
    setting: Setting,
    layers: Sequence[Layers] | None = None,
    *,
    dropout: bool = False,
    fused_loss: bool = False,
    placeholders: bool = False,
) -> ClusterMemory:
    """Return the bytes that the fullest device holds at its peak.

    Args:
        sizes: the model. context: T. global_batch: sequences of a step, over all replicas.
        parallelism: how the step is divided. setting: its dtype is that of weights and activations in products.
        layers: blocks by density; None is dense.
        dropout: whether masks of dropout are kept.
        fused_loss: whether the loss turns logits into their gradient in place, without a float32 copy.
        placeholders: whether gradients are added up in place of products, and empty ones of the same shape handed to
            autograd, as Transformer Engine does.

    Raises:
        UserError: the step cannot be divided like this.
    """
    check_split(sizes, global_batch, parallelism)
    micro, count = parallelism.micro_batches(global_batch)
    part = _Part(sizes, context * micro, context, parallelism, VALUE_BYTES.get(setting.dtype, 4.0), dropout, fused_loss)
    first, last = weights_of_stages(sizes, layers, parallelism)
    stages, chunks = np.asarray(parallelism.pipeline, dtype=float), parallelism.interleave
    own = sizes.layers / stages
    # The first stage is that many micro-batches ahead of the last one (arXiv 2104.04473, section 2.2).
    ahead = np.where(np.asarray(chunks) > 1, stages + (stages - 1.0) / chunks, stages)
    held = np.minimum(ahead, count)
    opening = part.memory(first, own * held, parallelism.pipeline == 1, placeholders)
    closing = part.memory(
        last,
        own * np.minimum(np.where(np.asarray(chunks) > 1, 1.0 + (stages - 1.0) / chunks, 1.0), count),
        True,
        placeholders,
    )
    fuller = np.asarray(opening.total) >= np.asarray(closing.total)
    return ClusterMemory(
        **{name: np.where(fuller, value, asdict(closing)[name]) for name, value in asdict(opening).items()}
    )


def check_fits(
    sizes: Sizes,
    context: float,
    global_batch: float,
    machine: Machine,
    parallelism: Parallelism,
    setting: Setting,
    layers: Sequence[Layers] | None = None,
) -> ClusterMemory:
    """Return the bytes on the fullest device if they fit.

    The arguments are those of `cluster_memory`, with one value each.

    Raises:
        UserError: they do not; the line says how much is missing, and what would fit.
    """
    needed = cluster_memory(sizes, context, global_batch, parallelism, setting, layers)
    level = machine.memory[0 if machine.streamed else -1]
    wanted, room = float(_on_device(needed, machine)), level.size.value
    if wanted <= room:
        return needed
    for name, other in _alternatives(sizes, global_batch, machine, parallelism):
        try:
            found = cluster_memory(sizes, context, global_batch, other, setting, layers)
        except UserError:
            continue
        if float(_on_device(found, machine)) <= room:
            advice = f"; {name} would fit"
            break
    else:
        advice = "; no other division of the step would fit"
    raise UserError(
        f"the step needs {wanted / 2**30:.1f} GiB on each {machine.name}, whose {level.name} has "
        f"{room / 2**30:.1f} GiB: {(wanted - room) / 2**30:.1f} GiB are missing{advice}"
    )


def _on_device(found: ClusterMemory, machine: Machine) -> Number:
    """Return the bytes on the device itself: if weights are streamed, their memory has everything else."""
    return found.activations + found.working if machine.streamed else found.total


def _alternatives(
    sizes: Sizes, global_batch: float, machine: Machine, now: Parallelism
) -> Iterator[tuple[str, Parallelism]]:
    """Yield other divisions with what they change, from small to large changes."""
    micro = int(now.micro_batches(global_batch)[0])
    smaller = [value for value in range(micro - 1, 0, -1) if micro % value == 0]
    for value in smaller:
        yield f"micro_batch={value}", replace(now, micro_batch=float(value))
    least = replace(now, micro_batch=1.0)
    yield "micro_batch=1 recompute=full", replace(least, recompute=FULL)
    if machine.streamed:
        return
    least = replace(least, recompute=FULL)
    if float(now.data) > 1 and now.zero < 3:
        yield "micro_batch=1 recompute=full zero=3", replace(least, zero=3)
    most = machine.links[0].devices if machine.links else 1
    for split in (2.0**power for power in range(1, 14)):
        tensor = min(split, float(most))
        if tensor * float(now.pipeline) > float(now.tensor) * float(now.pipeline):
            changed = replace(least, tensor=tensor, sequence=tensor > 1)
            yield f"tensor={tensor:g} sequence=true micro_batch=1 recompute=full", changed
        for stages in _divisors(int(float(sizes.layers))):
            if stages > float(now.pipeline) and stages * tensor == split:
                changed = replace(least, tensor=tensor, sequence=tensor > 1, pipeline=float(stages), interleave=1.0)
                yield f"tensor={tensor:g} pipeline={stages} sequence=true micro_batch=1 recompute=full", changed


def _divisors(number: int) -> list[int]:
    return [value for value in range(1, number + 1) if number % value == 0]


@dataclass(frozen=True)
class _Part:
    """What a stage keeps of one micro-batch."""

    sizes: Sizes
    tokens: Number
    context: Number
    divided: Parallelism
    value: float
    dropout: bool
    fused_loss: bool

    def memory(self, weights: Number, blocks: Number, has_head: Number, placeholders: bool) -> ClusterMemory:
        """Return the bytes of a stage with ``weights`` of its own and ``blocks`` whose activations it keeps."""
        divided, mixed = self.divided, self.value < 4.0
        shared = [divided.data if divided.zero >= stage else 1.0 for stage in (3, 2, 1)]
        head = np.asarray(has_head, dtype=bool)
        full = divided.recompute == FULL
        kept = blocks * (self._input() if full else self._block())
        kept = kept + np.where(head, 2.0 * self._input(), 0.0)  # of the last norm, and its result
        return ClusterMemory(
            weights=self.value * weights / shared[0],
            gradients=4.0 * weights / shared[1],
            optimizer=(12.0 if mixed else 8.0) * weights / shared[2],
            activations=kept,
            working=np.maximum(np.where(head, self._head(), 0.0), self._backward() + (self._block() if full else 0.0)),
            placeholders=np.where(head, self._empty(True), self._empty(False)) if placeholders else 0.0,
        )

    def _input(self) -> Number:
        whole = self.value * self.tokens * self.sizes.width
        return whole / self.divided.tensor if self.divided.sequence else whole

    def _block(self) -> Number:
        sizes, tokens, divided = self.sizes, self.tokens, self.divided
        around = 4.0 * self._input() + (2.0 * self._input() / self.value if self.dropout else 0.0)
        inside = (
            self.value * tokens * (2.0 * sizes.width + 2.0 * sizes.kv_width + sizes.ffn * (3.0 if sizes.gated else 2.0))
        )
        if divided.recompute != SELECTIVE:
            if divided.attention == UNFUSED:
                pairs = tokens * self.context * sizes.heads
                inside = inside + pairs * ((2.0 * self.value + 1.0) if self.dropout else self.value)
            else:
                inside = inside + 4.0 * tokens * sizes.heads
        return around + inside / divided.tensor

    def _head(self) -> Number:
        """Return the logits, their float32 copy and its gradient, and the head's input and its gradient, gathered."""
        logits = self.tokens * self.sizes.vocabulary / self.divided.tensor
        each = self.value + (0.0 if self.fused_loss or self.value >= 4.0 else 8.0)
        return each * logits + 2.0 * self.value * self.tokens * self.sizes.width

    def _backward(self) -> Number:
        """Return the gradients in the MLP of one block, beyond the activations that are given up."""
        inner = self.sizes.ffn * (2.0 if self.sizes.gated else 1.0) / self.divided.tensor
        return self.value * self.tokens * (inner + self.sizes.width)

    def _empty(self, has_head: bool) -> Number:
        """Return one gradient of each shape of matrix."""
        sizes = self.sizes
        shapes = sizes.width * (2.0 * sizes.width + 2.0 * sizes.kv_width + sizes.ffn * (3.0 if sizes.gated else 2.0))
        total = shapes + (sizes.vocabulary * sizes.width if has_head else 0.0)
        return self.value * total / self.divided.tensor
