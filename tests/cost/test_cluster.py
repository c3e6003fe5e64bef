"""Steps on several devices against the formulas of the papers, and against the same step on one device."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from sparsetrain.cost.cluster.links import group
from sparsetrain.cost.cluster.memory import check_fits, cluster_memory
from sparsetrain.cost.cluster.parallelism import Parallelism, check_split
from sparsetrain.cost.cluster.schedule import cluster_terms
from sparsetrain.cost.hardware import Machine
from sparsetrain.cost.operations import OPTIMIZER, step_operations
from sparsetrain.cost.sizes import Layers, Sizes
from sparsetrain.cost.timing import Setting, step_terms
from sparsetrain.errors import UserError

BF16 = Setting("bfloat16")
GPT = Sizes(1024.0, 8.0, 16.0, 1024.0, 4096.0, 32000.0, biased=True, positions=1024.0)
MATRICES = ("attn.qkv", "attn.out", "mlp.up", "mlp.down")
A100 = Machine.load("a100")


def seconds(
    divided: Parallelism, batch: float = 64.0, machine: Machine = A100, sizes: Sizes = GPT, **more: Any
) -> float:
    return float(cluster_terms(sizes, 1024.0, batch, machine, divided, BF16, **more).total)


def test_one_device_is_the_sum_of_its_operations() -> None:
    """All but the update, which in 16 bits also has a copy of the weights in 32."""
    operations = step_operations(GPT, 1024.0, 8.0, value_bytes=2.0, whole_logits=True)
    alone = step_terms([each for each in operations if each.kind != OPTIMIZER], A100, BF16)
    found = cluster_terms(GPT, 1024.0, 8.0, A100, Parallelism(), BF16)
    for name in ("compute", "memory", "index", "communication"):
        assert float(getattr(found, name)) == pytest.approx(float(getattr(alone, name)), rel=1e-12)
    assert float(found.overhead) == pytest.approx(float(alone.overhead) + A100.launch.value)
    assert float(found.optimizer) > 0.0


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("count", [8, 32])
def test_bubble_of_equal_stages_is_that_of_narayanan(stages: int, chunks: int, count: int) -> None:
    """arXiv 2104.04473, section 2.2: (p - 1) / (v m) of the time without a bubble, if the stages are equal."""
    sizes = replace(GPT, layers=16.0, vocabulary=1e-6, positions=0.0)
    free = replace(
        A100, launch=None, links=tuple(replace(link, latency=replace(link.latency, value=0.0)) for link in A100.links)
    )
    divided = Parallelism(pipeline=stages, interleave=chunks if stages < 16 else 1, micro_batch=1)
    terms = cluster_terms(sizes, 1024.0, float(count), free, divided, BF16)
    busy = float(terms.total) - float(terms.overhead) - float(terms.optimizer)
    assert float(terms.overhead) / busy == pytest.approx((stages - 1) / (chunks * count), rel=0.02)


def test_collectives_are_those_of_a_ring() -> None:
    """A ring's all-reduce moves 2 (n - 1) / n of the bytes over every link."""
    link = A100.links[0]
    ring = group(A100, 8.0, 1.0)
    assert float(ring.all_reduce(8e9)) == pytest.approx(2 * 7 / 8 * 8e9 / link.rate + 14 * link.latency.value)
    assert float(ring.all_gather(8e9) + ring.reduce_scatter(8e9)) == pytest.approx(float(ring.all_reduce(8e9)))
    alone = group(A100, 1.0, 1.0)
    assert float(alone.all_reduce(8e9)) == 0.0
    two_nodes = group(A100, 16.0, 1.0)
    outer = A100.links[1]
    expected = 7 / 8 * 8e9 / link.rate + 1 / 2 * 1e9 / outer.rate + 7 * link.latency.value + outer.latency.value
    assert (two_nodes.near, float(two_nodes.all_gather(8e9))) == (8.0, pytest.approx(expected))
    far = group(A100, 4.0, 8.0)  # one device of each of four nodes
    assert float(far.all_gather(8e9)) == pytest.approx(3 / 4 * 8e9 / outer.rate + 3 * outer.latency.value)


def test_more_devices_than_links_join_are_one_line() -> None:
    with pytest.raises(UserError, match=r"^32768 devices of a100: its links join at most 16384$"):
        group(A100, 32768.0, 1.0)
    with pytest.raises(UserError, match=r"^2 devices of zen4: its links join at most 1$"):
        group(Machine.load("zen4"), 2.0, 1.0)


def test_what_is_divided_by_tensor_parallelism() -> None:
    """All products; with the sequence divided, everything between them, too (arXiv 2205.05198)."""
    flat = replace(
        A100, launch=None, memory=A100.memory[-1:], efficiency={**A100.efficiency, "linear": A100.efficiency["default"]}
    )
    one = cluster_terms(GPT, 1024.0, 8.0, flat, Parallelism(), BF16)
    some_of_it = cluster_terms(GPT, 1024.0, 8.0, flat, Parallelism(tensor=8), BF16)
    all_of_it = cluster_terms(GPT, 1024.0, 8.0, flat, Parallelism(tensor=8, sequence=True), BF16)
    assert float(some_of_it.compute) == pytest.approx(float(one.compute) / 8, rel=0.05)
    assert float(all_of_it.memory) == pytest.approx(float(one.memory) / 8)
    assert float(all_of_it.memory) < float(some_of_it.memory) < float(one.memory)
    assert float(some_of_it.communication) > 0.0
    assert float(one.communication) == 0.0


def test_replicas_reduce_gradients_once_and_share_the_update() -> None:
    plain = cluster_terms(GPT, 1024.0, 64.0, A100, Parallelism(data=8, overlap=False), BF16)
    shared = cluster_terms(GPT, 1024.0, 64.0, A100, Parallelism(data=8, overlap=False, zero=1), BF16)
    hidden = cluster_terms(GPT, 1024.0, 64.0, A100, Parallelism(data=8), BF16)
    weights = 2.0 + 4.0  # bytes: a reduction of 4 twice around, against one of 4 and one of 2 once
    assert float(shared.communication) / float(plain.communication) == pytest.approx(weights / 8.0, rel=0.01)
    assert float(shared.optimizer) == pytest.approx(float(plain.optimizer) / 8)
    assert float(hidden.communication) == pytest.approx(float(plain.communication) * (1 - A100.overlap.value))
    assert float(plain.compute) == pytest.approx(float(shared.compute))


def test_recomputation_repeats_the_forward_pass() -> None:
    """Full: one more forward pass, a third of the products' time; selective: attention alone."""
    none, selective, full = (
        cluster_terms(GPT, 1024.0, 8.0, A100, Parallelism(recompute=each), BF16)
        for each in ("none", "selective", "full")
    )
    head = float(cluster_terms(replace(GPT, layers=0.0), 1024.0, 8.0, A100, Parallelism(), BF16).compute)
    assert (float(full.compute) - head) / (float(none.compute) - head) == pytest.approx(4 / 3)
    assert float(none.total) < float(selective.total) < float(full.total)


def test_arrays_are_the_values_of_their_places() -> None:
    data = np.asarray([1.0, 2.0, 8.0, 64.0])
    width = np.asarray([512.0, 1024.0, 2048.0, 4096.0])
    density = np.asarray([1.0, 0.5, 0.25, 0.1])
    sizes = replace(GPT, width=width, kv_width=width, ffn=4.0 * width)
    layers = [Layers(8.0, dict.fromkeys(MATRICES, density))]
    for name in ("h100", "cs3"):
        machine = Machine.load(name)
        together = cluster_terms(sizes, 1024.0, 64.0, machine, Parallelism(data=data), BF16, layers)
        for place in range(len(data)):
            own = replace(GPT, width=width[place], kv_width=width[place], ffn=4.0 * width[place])
            one = [Layers(8.0, dict.fromkeys(MATRICES, density[place]))]
            alone = cluster_terms(own, 1024.0, 64.0, machine, Parallelism(data=data[place]), BF16, one)
            for term, value in together.as_dict().items():
                assert np.broadcast_to(value, data.shape)[place] == pytest.approx(
                    float(alone.as_dict()[term]), rel=1e-12
                )


def test_streamed_weights_wait_for_the_link_if_there_is_little_to_compute() -> None:
    """One token: every weight of a product arrives twice, 2 bytes each and 4 for its position if it is sparse."""
    cs3 = Machine.load("cs3")
    sizes = replace(GPT, biased=False, layernorm=False, positions=0.0, vocabulary=1e-6)
    weights = 8.0 * 12.0 * 1024.0**2
    dense = cluster_terms(sizes, 1.0, 1.0, cs3, Parallelism(), BF16)
    assert float(dense.memory + dense.compute) == pytest.approx(2.0 * 2.0 * weights / cs3.links[0].rate, rel=0.02)
    assert float(dense.communication + dense.optimizer + dense.index) == 0.0
    sparse = [Layers(8.0, dict.fromkeys(MATRICES, 0.1))]
    found = cluster_terms(sizes, 1.0, 1.0, cs3, Parallelism(), BF16, sparse)
    assert float(found.index) / float(found.memory) == pytest.approx(2.0, rel=0.1)
    many = cluster_terms(sizes, 2048.0, 256.0, cs3, Parallelism(), BF16, sparse)
    assert float(many.index) == 0.0  # what computes long enough hides its weights
    twice = cluster_terms(sizes, 2048.0, 256.0, cs3, Parallelism(data=2), BF16, sparse)
    assert float(twice.communication) == 0.0
    assert float(twice.compute) == pytest.approx(float(many.compute) / 2)


@given(
    density=some.floats(0.01, 1.0),
    tokens=some.sampled_from([1.0, 64.0, 4096.0]),
    name=some.sampled_from(["cs3", "h100"]),
)
@settings(max_examples=40, deadline=None)
def test_more_nonzeros_never_take_less(density: float, tokens: float, name: str) -> None:
    machine = Machine.load(name)
    sizes = replace(GPT, biased=False)  # a dense product adds its bias itself, a sparse one takes another pass
    thinner, thicker = (
        cluster_terms(
            sizes, tokens, 1.0, machine, Parallelism(), BF16, [Layers(8.0, dict.fromkeys(MATRICES, min(1.0, each)))]
        ).total
        for each in (density, 1.1 * density)
    )
    assert float(thicker) >= float(thinner) * (1 - 1e-9)


def test_tensor_and_pipeline_may_be_arrays() -> None:
    tensor, stages = np.asarray([1.0, 2.0, 4.0, 8.0]), np.asarray([8.0, 1.0, 2.0, 4.0])
    together = cluster_terms(GPT, 1024.0, 64.0, A100, Parallelism(2.0, tensor, stages, micro_batch=1.0), BF16)
    bytes_of = cluster_memory(GPT, 1024.0, 64.0, Parallelism(2.0, tensor, stages, micro_batch=1.0), BF16)
    for place in range(4):
        divided = Parallelism(2.0, tensor[place], stages[place], micro_batch=1.0)
        assert together.total[place] == pytest.approx(seconds(divided), rel=1e-12)
        assert bytes_of.total[place] == pytest.approx(float(cluster_memory(GPT, 1024.0, 64.0, divided, BF16).total))


def test_gpus_do_not_skip_zeros_and_wafers_do() -> None:
    sparse = [Layers(8.0, dict.fromkeys(MATRICES, 0.25))]
    for name, skips in (("h100", False), ("b200", False), ("cs2", True), ("zen4", True)):
        machine = Machine.load(name)
        dense, thin = (seconds(Parallelism(), 8.0, machine, layers=layers) for layers in (None, sparse))
        assert (thin < 0.9 * dense) == skips, name
    pairs = replace(BF16, two_of_four=True)
    half = [Layers(8.0, dict.fromkeys(MATRICES, 0.5))]
    dense, thin = (
        float(cluster_terms(GPT, 1024.0, 8.0, A100, Parallelism(), setting, half).compute) for setting in (BF16, pairs)
    )
    assert 1.1 < dense / thin < 1.24  # of products with weights 1.2376, of attention and the head nothing


@given(
    data=some.sampled_from([1, 2, 8, 32]),
    tensor=some.sampled_from([1, 2, 4, 8]),
    stages=some.sampled_from([1, 2, 4, 8]),
    zero=some.integers(0, 3),
    recompute=some.sampled_from(["none", "selective", "full"]),
    attention=some.sampled_from(["fused", "unfused"]),
    sequence=some.booleans(),
    overlap=some.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_terms_add_up_and_more_work_never_takes_less(**chosen: Any) -> None:
    sequence = chosen.pop("sequence") and chosen["tensor"] > 1
    stages = chosen.pop("stages")
    divided = Parallelism(**chosen, sequence=sequence, pipeline=stages, micro_batch=1)
    terms = cluster_terms(GPT, 512.0, 64.0, A100, divided, BF16)
    assert all(float(value) >= 0.0 for value in asdict(terms).values())
    assert sum(float(value) for value in asdict(terms).values()) == pytest.approx(float(terms.total), rel=1e-9)
    assert np.isfinite(float(terms.total))
    for sizes, context, batch in (
        (replace(GPT, layers=16.0), 512.0, 64.0),
        (GPT, 1024.0, 64.0),
        (GPT, 512.0, 128.0),
        (replace(GPT, ffn=8192.0), 512.0, 64.0),
    ):
        assert float(cluster_terms(sizes, context, batch, A100, divided, BF16).total) >= float(terms.total) * (1 - 1e-9)
    memory = cluster_memory(GPT, 512.0, 64.0, divided, BF16)
    assert sum(float(value) for value in asdict(memory).values()) == pytest.approx(float(memory.total), rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tensor": 3}, "parallelism.tensor=3 does not divide the 16 attention heads"),
        ({"tensor": 32}, "parallelism.tensor=32 does not divide the 16 attention heads"),
        ({"pipeline": 3}, "parallelism.pipeline * interleave=3 does not divide the 8 blocks"),
        ({"pipeline": 4, "interleave": 4}, "parallelism.pipeline * interleave=16 does not divide the 8 blocks"),
        ({"interleave": 2}, "parallelism.interleave=2 needs pipeline of at least 2"),
        ({"data": 7}, "parallelism.data=7 does not divide the 64 sequences of the batch"),
        ({"data": 8, "micro_batch": 3}, "parallelism.micro_batch=3 does not divide the 8 sequences of a replica"),
        ({"sequence": True}, "tensor must be at least 2"),
        ({"data": 0}, "parallelism.data=0 must be a whole number of at least 1"),
        ({"data": 1.5}, "parallelism.data=1.5 must be a whole number of at least 1"),
        ({"data": float("nan")}, "parallelism.data=nan must be a whole number of at least 1"),
        ({"zero": 4}, "parallelism.zero=4 is not one of 0, 1, 2, 3"),
        ({"recompute": "some"}, "parallelism.recompute='some' is not one of none, selective, full"),
        ({"reduce_bytes": 0.0}, "parallelism.reduce_bytes=0.0 must be above 0"),
        ({"data": np.asarray([8.0, 3.0])}, "parallelism.data=3 does not divide the 64 sequences of the batch"),
    ],
)
def test_a_division_that_is_impossible_is_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_split(GPT, 64.0, Parallelism(**changes))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_fit_says_what_is_missing_and_what_would_fit() -> None:
    large = Sizes(8192.0, 80.0, 64.0, 8192.0, 32768.0, 50368.0)
    with pytest.raises(UserError, match=r"^the step needs .* GiB on each h100, .* missing; (.*) would fit$") as caught:
        check_fits(large, 2048.0, 64.0, Machine.load("h100"), Parallelism(micro_batch=1), BF16)
    advice = str(caught.value).split("missing; ")[1].removesuffix(" would fit")
    changes: dict[str, Any] = dict(pair.split("=") for pair in advice.split(" "))
    chosen = {name: value == "true" if value in ("true", "false") else value for name, value in changes.items()}
    chosen = {name: float(value) if str(value).isdigit() else value for name, value in chosen.items()}
    check_fits(large, 2048.0, 64.0, Machine.load("h100"), Parallelism(**chosen), BF16)
    with pytest.raises(UserError, match=r"; micro_batch=\d+ would fit$"):
        check_fits(GPT, 1024.0, 512.0, A100, Parallelism(), BF16)
    check_fits(GPT, 1024.0, 8.0, A100, Parallelism(), BF16)
    check_fits(large, 1024.0, 8.0, Machine.load("cs3"), Parallelism(micro_batch=1), BF16)
