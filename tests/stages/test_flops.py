"""`sparsetrain flops`: its table and its JSON against the ledger, for a configuration and for a run's own model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sparsetrain as st
from sparsetrain.cli import main
from sparsetrain.cli.resolve import load
from sparsetrain.cost.run_flops import UPDATES
from sparsetrain.stages.generate import load_run
from sparsetrain.studies.flops import counted

SMALL = ["data.tokenizer=bytes", "data.context=32", "model=tiny", "parameterization.base_width=16"]


def test_json_is_the_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "flops.json"
    words = [*SMALL, "sparsity.sparsity=0.75", "budget.batch_size=4", "format=json", f"output={file}"]
    assert main(["flops", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(file.read_text())
    config = load("flops", words)
    vocabulary = counted(config).ledger.by_module["head"] // (6 * 4 * 32 * config.model["d_model"])
    shape = {key: value for key, value in config.model.items() if value is not None and key != "vocab_size"}
    model = st.ModelConfig(**shape | {"vocab_size": vocabulary, "sparsity": 0.75})
    ledger = st.flops(model, 32, 4)
    assert found["total"] == ledger.total
    assert found["by_kind"] == ledger.by_kind
    assert found["by_module"] == ledger.by_module
    assert found["memory"] == st.step_memory(model, 32, 4).as_dict()
    assert found["context"] == 32
    assert found["batch_size"] == 4


def test_the_table_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    phases = "budget.phases=[{share: 0.5, context: 16}, {share: 0.5, context: 32}]"
    assert main(["flops", *SMALL, "sparsity.sparsity=0.5", "budget.steps=10", phases]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for word in ("blocks.*.attn.qkv", "attention causal, zeros counted", "activations", "the run:", "16 x ", "32 x "):
        assert word in out
    assert main(["flops", *SMALL, "phase=decoding", "cached=31"]) == 0
    out = capsys.readouterr().out
    assert "keys and values in the cache" in out
    assert "activations" not in out


def test_updates_of_the_masks_come_on_top_of_the_steps_of_a_run() -> None:
    config = load("flops", [*SMALL, "sparsity=rigl", "sparsity.sparsity=0.5", "budget.steps=400"])
    found = counted(config)
    assert found.run is not None
    assert found.run > 400 * found.ledger.total
    assert UPDATES not in found.ledger.by_kind
    dense = counted(load("flops", [*SMALL, "budget.steps=20"]))
    assert dense.run == 20 * dense.ledger.total


def test_a_trained_model_is_counted_as_it_is(tmp_path: Path, notes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    words = [*SMALL, f"data.path={notes}", "data=file", "sparsity.sparsity=0.5", "budget.batch_size=2"]
    assert main(["pretrain", *words, "budget.steps=1", f"run_dir={run}"]) == 0
    capsys.readouterr()
    model, _ = load_run(run, torch.device("cpu"))
    assert main(["flops", f"init_from={run}", "budget.batch_size=2", "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["context"] == 32
    assert found["total"] == st.flops(model, 32, 2).total
    assert main(["quantize", str(run), f"out={tmp_path / 'small'}"]) == 0
    capsys.readouterr()
    step = ["phase=decoding", "cached=31", "budget.batch_size=2", "format=json"]
    assert main(["flops", f"quantized={tmp_path / 'small'}", *step]) == 0
    small = json.loads(capsys.readouterr().out)
    assert small["total"] == st.flops(model, 1, 2, phase="decoding", cached=31).total
    assert small["weight_bytes"] < found["weight_bytes"] / 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attention=causl"], "did you mean 'causal'"),
        (["zeros=maybe"], "zeros='maybe' is not one of skipped, counted"),
        (["cached=-1"], "cached=-1 is not a whole number of at least 0"),
        (["cached=3"], "cached=3 needs phase=decoding, not training"),
        (["phase=decoding"], "cached=0: phase=decoding needs"),
        (["init_from=nowhere"], "init_from=nowhere"),
        (["quantized=nowhere"], "nowhere"),
        (["output="], "output"),
        (["data.context=0"], "context"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flops", *SMALL, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
