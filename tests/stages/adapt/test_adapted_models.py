"""What an adaptation adds to a model, what stays the same, and what is measured."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import CPU, ENGLISH, Make, by_hand, given, validation, weights
from rich.console import Console
from runs import assert_same_run, stop_after

from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.sparsity import sparse_layers
from sparsetrain.stages import AdaptConfig, RunResult, adapt
from sparsetrain.stages.generate import load_run
from sparsetrain.training.state import Interrupted

# Outputs of these tiny layers may lose all weights.
pytestmark = pytest.mark.filterwarnings("ignore:.* have no weight")


def test_what_is_measured_is_the_loss_over_the_bytes_of_the_text(
    first: RunResult, bases: dict[bool, Path], home: Path
) -> None:
    found = first["adaptation"]
    for name in ("english", "arabic"):
        text = validation(first.directory, name, home)
        entry = found["corpora"][name]
        assert entry["bytes"] == sum(len(one.encode()) for one in text)
        assert entry["bits_per_byte"]["before"] == pytest.approx(by_hand(bases[True], text), rel=1e-5)
        assert entry["bits_per_byte"]["after"] == pytest.approx(by_hand(first.directory, text), rel=1e-5)
        old, new = (Tokenizer.load(place) for place in (bases[True], first.directory))
        for which, tokenizer in (("old", old), ("new", new)):
            tokens = sum(len(tokenizer.encode(one)) for one in text)
            assert entry["tokens_per_byte"][which] == tokens / entry["bytes"]
            assert entry["tokens_per_word"][which] == tokens / sum(len(one.split()) for one in text)
        assert entry["val_loss"]["before"] != entry["val_loss"]["after"]
    assert (
        found["corpora"]["arabic"]["tokens_per_byte"]["new"]
        < 0.7 * found["corpora"]["arabic"]["tokens_per_byte"]["old"]
    )
    english = found["corpora"]["english"]["bits_per_byte"]
    assert found["forgetting"] == english["after"] - english["before"]
    # The text of the first language is split as before, also the document with letters of the other.
    assert all(new.encode(text) == old.encode(text) for text in ENGLISH)


def test_before_is_the_model_as_its_own_run_had_it(make: Make, bases: dict[bool, Path], home: Path) -> None:
    config = make(AdaptConfig, False, init_from=bases[False], run_dir=home / "rescaled", vocabulary={"n_tokens": 30})
    config.parameterization = replace(config.parameterization, alpha_out=4.0)  # another function at the start
    found = adapt(config, Console(file=io.StringIO()))["adaptation"]
    bits = found["corpora"]["english"]["bits_per_byte"]
    text = validation(home / "rescaled", "english", home)
    assert bits["before"] == pytest.approx(by_hand(bases[False], text), rel=1e-5)
    assert bits["initialised"] != pytest.approx(bits["before"], rel=1e-3)
    assert found["forgetting"] == bits["after"] - bits["before"]


def test_the_resulting_model_is_recorded_and_only_embeddings_were_trained(
    first: RunResult, bases: dict[bool, Path]
) -> None:
    old, new = weights(bases[True]), weights(first.directory)
    tokens = Tokenizer.load(bases[True]).vocab_size
    rows = -(-(tokens + 30) // 8) * 8
    assert first["model"]["n_layers"] == 3
    assert first["model"]["vocab_size"] == len(new["embed.weight"]) == len(new["head.weight"]) == rows
    assert first["adaptation"]["new_rows"] == 30
    assert first["trained_parameters"] == 2 * rows * 16
    # Two blocks and one new one: it stands behind the second.
    for name, value in old.items():
        if name.startswith("blocks."):
            assert torch.equal(new[name], value), name
            copied = new[name.replace("blocks.1.", "blocks.2.")]
            if name.startswith("blocks.1.") and name.split(".", 2)[2] in {
                f"{layer}.{leaf}" for layer in ("attn.out", "mlp.down") for leaf in ("values", "bias")
            }:
                assert torch.equal(copied, torch.zeros_like(value))
            elif name.startswith("blocks.1."):
                assert torch.equal(copied, value)
        elif name not in ("embed.weight", "head.weight"):
            assert torch.equal(new[name], value), name
    model, _ = load_run(first.directory, CPU)
    densities = {name: layer.pattern.density for name, layer in sparse_layers(model)}
    assert len(densities) == 15
    assert set(densities.values()) == {0.5}
    assert model.logit_scale == 2.0 / (16 / 8)
    norms = first["adaptation"]["row_norms"]["initialised"]
    assert norms["embed.weight"]["new"] == pytest.approx(norms["embed.weight"]["old"], rel=1e-5)


@pytest.mark.parametrize(("sparse", "new_blocks"), [(True, 1), (False, 2)])
def test_new_blocks_change_nothing_at_first(
    sparse: bool, new_blocks: int, bases: dict[bool, Path], make: Make, tmp_path: Path, screen: Console
) -> None:
    config = make(
        AdaptConfig,
        sparse,
        init_from=bases[sparse],
        run_dir=tmp_path / "deeper",
        new_blocks=new_blocks,
        train="blocks",
        budget={"steps": 1, "batch_size": 4},
    )
    tokens = torch.arange(64).view(4, 16)
    model, _ = load_run(bases[sparse], CPU)
    found = adapt(config, screen)
    entry = found["adaptation"]["corpora"]["english"]["bits_per_byte"]
    assert entry["initialised"] == entry["before"]
    # One step has made the new blocks do something; without it, the logits are the same bits.
    deeper, _ = load_run(found.directory, CPU)
    places = {1: (2,), 2: (1, 3)}[new_blocks]
    old = weights(bases[sparse])
    kept = [place for place in range(2 + new_blocks) if place not in places]
    for name, value in weights(found.directory).items():
        place = int(name.split(".")[1]) if name.startswith("blocks.") else None
        if place in kept:
            assert torch.equal(value, old[name.replace(f"blocks.{place}.", f"blocks.{kept.index(place)}.")])
    with torch.no_grad():
        assert not torch.equal(deeper(tokens), model(tokens))
        for place in places:
            block: Any = deeper.blocks[place]
            for layer in (block.attn.out, block.mlp.down):
                for parameter in layer.parameters():
                    assert bool(parameter.any())
                    parameter.zero_()
        assert torch.equal(deeper(tokens), model(tokens))


@pytest.mark.parametrize("sparse", [True, False])
def test_old_rows_keep_their_bits_and_new_ones_are_those_of_torch(
    sparse: bool, bases: dict[bool, Path], make: Make, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(
        AdaptConfig,
        sparse,
        init_from=bases[sparse],
        run_dir=tmp_path / "rows",
        vocabulary={"n_tokens": 20},
        train="new_rows",
        optimizer={"lr": 0.1, "weight_decay": 0.5},
    )
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted, match="stopped after step 2 of 4"):
            adapt(config, screen)
    cut = adapt(config, screen)
    whole = adapt(make(AdaptConfig, sparse, **{**given(config), "run_dir": tmp_path / "whole"}), screen)
    assert_same_run(tmp_path / "rows", tmp_path / "whole")
    assert cut["adaptation"] == whole["adaptation"]
    old, new = weights(bases[sparse]), weights(cut.directory)
    count = len(old["embed.weight"])
    for name in ("embed.weight", "head.weight"):
        assert torch.equal(new[name][:count], old[name])
        assert bool((new[name][count:].norm(dim=1) > 0).all())
    assert all(
        torch.equal(new[name], value) for name, value in old.items() if name not in ("embed.weight", "head.weight")
    )
    assert cut["trained_parameters"] == 20 * 16 * (2 if sparse else 1)
