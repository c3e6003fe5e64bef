"""Unusable input of the command line: one line, status 2, and no file written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from shell import TINY, Shell

from sparsetrain import files
from sparsetrain.runs.checkpoint import OptimizerTensors, load_checkpoint, save_checkpoint


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["pretrian"], ["pretrian", "did you mean 'pretrain'?"]),
        (["pretrain", "model.d_modle=64"], ["d_modle", "did you mean 'model.d_model'?"]),
        (["pretrain", "modle=tiny"], ["modle", "did you mean 'model'?"]),
        (["pretrain", "model=tny"], ["tny", "did you mean 'tiny'?"]),
        (["pretrain", "schedule.name=cosin"], ["cosin", "did you mean 'cosine'?"]),
        (["pretrain", "sparsity.sparsity=1.0"], ["sparsity=1.0", "[0, 1)"]),
        (["pretrain", "sparsity.sparsity=-0.1"], ["sparsity=-0.1", "[0, 1)"]),
        (["pretrain", "model.d_model=33"], ["d_model=33", "n_heads=2"]),
        (["pretrain", "data.tokenizer=bpe", "data.vocab_size=70000", "data.token_dtype=uint16"], ["uint16", "70000"]),
        (["pretrain", "optimizer.lr=fast"], ["optimizer.lr", "fast"]),
        (["pretrain", "optimizer.lr=1e-3,2e-3"], ["optimizer.lr=1e-3,2e-3", "-m"]),
        (["pretrain", "--multrun"], ["--multrun", "did you mean '--multirun'?"]),
        (["pretrain", "-m", "--confg-dir", "x"], ["--confg-dir", "did you mean '--config-dir'?"]),
        (["pretrain", "--cfg", "jb"], ["jb", "did you mean 'job'?"]),
        (["pretrain", "words"], ["words"]),
        (["pretrain", "data.path=missing.txt"], ["missing.txt", "no such file"]),
        (["pretrain", "data.path=empty.txt"], ["empty.txt", "empty"]),
        (["pretrain", "data.path=latin1.txt"], ["latin1.txt", "not UTF-8", "0xe9"]),
        (["pretrain", "sparsity.sparsity=0.9999"], ["blocks.0.attn.qkv", "no weight at all"]),
        (["pretrain", "run_dir=file.txt"], ["file.txt", "cannot write"]),
        (["pretrain", "run_dir=new/run", "init_from=nowhere"], ["init_from=nowhere", "no such run directory"]),
        (["finetune", "init_from=nowhere"], ["init_from=nowhere", "no such run directory"]),
        (["finetune", "task=pubmedqa", "task.path=nowhere"], ["task.path=nowhere", "ori_pqal.json"]),
        (["prompt"], ["init_from is missing"]),
        (["generate"], ["init_from is missing"]),
        (["generate", "init_from=nowhere"], ["nowhere", "not a run directory"]),
        (["report"], ["required", "PATH"]),
        (["report", "a", "--uot", "b"], ["--uot", "did you mean '--out'?"]),
        (["report", "nowhere"], ["nowhere", "holds no run"]),
        (["report", "a", "b"], ["a holds no run"]),
        (["report", "a.csv"], ["cannot read a.csv"]),
        (["mask"], ["mask needs a subcommand: sparsetrain mask inspect PATH [picture=FILE]"]),
        (["mask", "inspekt", "x.npz"], ["inspect", "not 'inspekt'"]),
        (["mask", "inspect"], ["one path"]),
        (["mask", "inspect", "a.npz", "b.npz"], ["one path"]),
        (["mask", "inspect", "nowhere"], ["nowhere: no such run, checkpoint or file"]),
        (["mask", "inspect", "nowhere.npz"], ["nowhere.npz: no such file"]),
        (["mask", "inspect", "file.txt"], ["file.txt", ".npz or .safetensors"]),
        (["pretrain", "sparsity=riggl"], ["sparsity=riggl", "did you mean 'rigl'?"]),
        (["pretrain", "sparsity=rigl", "sparsity.evolution.every=1000"], ["sparsity.evolution", "leaves no update"]),
        (["pretrain", "sparsity.evolution.rule=rgl"], ["sparsity.evolution.rule='rgl'", "did you mean 'rigl'?"]),
        (
            ["pretrain", "sparsity=rigl", "sparsity.evolution.curve=linear"],
            ["curve is no setting of rule=rigl"],
        ),
        (["pretrain", "sparsity.evolution.evry=1"], ["evry", "did you mean 'sparsity.evolution.every'?"]),
        (["pretrain", "sparsity=block", "sparsity.block=[512,512]"], ["block 512x512 is larger than the matrix"]),
        (["data", "data.pth=x"], ["data.pth", "did you mean 'data.path'?"]),
        (["pretrain", "-m", "optimizer.lr=1e-3,fast"], ["optimizer.lr='fast' must be a number"]),
        (["pretrain", "-m", "model=tiny,dmo"], ["dmo", "did you mean 'demo'?"]),
        (["pretrain", "-m", "hydra/launcher=jobli"], ["jobli"]),
    ],
    ids=lambda value: " ".join(value[:3]) if value and isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_status_2(shell: Shell, words: list[str], parts: list[str]) -> None:
    (shell.home / "empty.txt").touch()
    (shell.home / "latin1.txt").write_bytes("café\n\ncrème".encode("latin-1"))
    (shell.home / "file.txt").write_text("no directory")
    verb, *rest = words
    general = shell.tiny if verb in ("pretrain", "finetune") else []
    line = shell.refused(verb, *general, *rest)
    for part in parts:
        assert part in line


def test_no_device_is_one_line(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device=cuda: this torch sees no CUDA device" in shell.refused("pretrain", *shell.tiny, "device=cuda")


def test_tokens_of_another_tokenizer_are_refused(shell: Shell) -> None:
    shell.trained()
    (corpus,) = (Path(os.environ["SPARSETRAIN_CACHE"]) / "corpora").iterdir()
    tokenizer = corpus / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    content["model"]["dropout"] = 0.5
    tokenizer.write_text(json.dumps(content))
    assert "token file of another tokenizer" in shell.refused("pretrain", *shell.tiny, "seed=1")


def test_a_checkpoint_of_another_shape_is_refused(shell: Shell) -> None:
    shell.trained()
    line = shell.refused("finetune", "init_from=run", *shell.task, "budget.steps=1", "model.d_model=64")
    assert "model.d_model=64 (there: 32)" in line
    config = shell.home / "run" / "config.yaml"
    config.write_text(config.read_text().replace("d_model: 32", "d_model: 48"))
    line = shell.refused("finetune", "init_from=run", *shell.task, "budget.steps=1")
    assert "does not fit this model" in line
    assert "size mismatch" in line
    assert len(line) < 600


def test_a_checkpoint_with_malformed_indices_is_refused(shell: Shell) -> None:
    run = shell.trained()
    stored = load_checkpoint(run / "checkpoints")
    stored.model["blocks.0.mlp.up.col"][0] = 99
    shutil.rmtree(run / "checkpoints")
    save_checkpoint(run / "checkpoints", 3, stored.model, OptimizerTensors({}, []), stored.state, 1)
    for words in (["finetune", "init_from=run", *shell.task, "budget.steps=1"], ["generate", "init_from=run"]):
        line = shell.refused(*words)
        assert "blocks.0.mlp.up" in line


SECTIONS = [
    *("model: null", "model: [1]", "model: tiny", "sparsity: null", "optimizer: null", "parameterization: null"),
    *("schedule: x", "data: 1", "seed: a", "sparsity: {evolution: null}", "sparsity: {groups: [null]}"),
    *("sparsity: {include: [1]}", "model: {n_layers: 1000000000, d_model: 32, n_heads: 2}", "model: {d_model: [1]}"),
]


def test_a_configuration_whose_values_are_of_other_types_is_one_line(shell: Shell) -> None:
    """Settings recorded by an old run are checked before use, as typed ones are."""
    config = shell.trained() / "config.yaml"
    whole = yaml.safe_load(config.read_text())
    for text in [*SECTIONS, "deep: " + "[" * 5000 + "]" * 5000]:
        if text.startswith("deep"):
            config.write_text(text)
        else:
            config.write_text(yaml.safe_dump(whole | yaml.safe_load(text)))
        line = shell.refused("generate", "init_from=run", "max_new_tokens=1")
        assert any(word in line for word in ("must", "nests", "levels", "above", "is missing")), (text, line)
        if text.startswith(("model", "deep")):
            shell.refused("mask", "inspect", "run")


@pytest.mark.parametrize("name", ["manifest.json", "config.yaml"])
def test_a_full_disk_is_one_line(shell: Shell, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def full(path: Path) -> None:
        if name in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "flush", full)
    line = shell.refused("pretrain", *shell.tiny, "run_dir=run")
    assert "no space left on" in line
    assert "free some" in line
    cache = Path(os.environ["SPARSETRAIN_CACHE"]) / "corpora"
    assert not cache.exists() or len(list(cache.iterdir())) == (name != "manifest.json")


def test_a_hub_source_without_network_is_one_line(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoNetwork:
        @staticmethod
        def load_dataset(*_: Any, **__: Any) -> None:
            raise ConnectionError("Couldn't reach the hub\nsecond line")

    monkeypatch.setitem(sys.modules, "datasets", NoNetwork())
    line = shell.refused("pretrain", *TINY, "data=hub", "data.hub_name=owner/name")
    assert "owner/name" in line
    assert "data.path" in line


def test_what_was_wrong_can_be_put_right_in_the_same_directory(shell: Shell) -> None:
    shell.trained()
    words = ["finetune", "init_from=run", "budget.steps=1", "budget.batch_size=4", "run_dir=tuned"]
    assert "task.path=nowhere" in shell.refused(*words, "task=pubmedqa", "task.path=nowhere")
    assert shell.run(*words, *shell.task)[0] == 0
