"""The command line as a person uses it: statuses, single lines, what it leaves on the disk, sweeps."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
from typing import Any

import pytest
import torch
from shell import Shell

import sparsetrain
from sparsetrain.cli import ABOUT, EXAMPLES, PLAIN
from sparsetrain.config import check, complete, load
from sparsetrain.models import Transformer

# What there is to read.


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb(shell: Shell, words: list[str]) -> None:
    status, out, err = shell.run(*words)
    assert (status, err) == (0, "")
    for verb, about in ABOUT.items():
        assert re.search(rf"^  {verb} +{re.escape(about)}$", out, re.MULTILINE)


@pytest.mark.parametrize("verb", list(ABOUT))
def test_help_of_a_verb_has_examples_and_settings(shell: Shell, verb: str) -> None:
    status, out, err = shell.run(verb, "--help")
    assert (status, err) == (0, "")
    assert f"sparsetrain {verb}: {ABOUT[verb]}" in out
    assert all(f"  {example}\n" in out + "\n" for example in EXAMPLES[verb])
    if verb in ("pretrain", "pipeline"):
        assert re.search(r"^  optimizer\.lr = ", out, re.MULTILINE)
        assert re.search(r"^  model +btlm-3b, cerebras-111m, demo", out, re.MULTILINE)


@pytest.mark.parametrize("verb", [verb for verb in ABOUT if verb not in PLAIN])
def test_the_examples_of_help_are_valid(verb: str, shell: Shell) -> None:
    for example in EXAMPLES[verb]:
        program, said, *words = shlex.split(example)
        assert (program, said) == ("sparsetrain", verb)
        sweep = "-m" in words
        check(verb, complete(word for word in words if word != "-m"), sweep=sweep)
        if not sweep and "init_from=RUN_DIR" not in words:
            load(verb, words)


def test_version(shell: Shell) -> None:
    assert shell.run("--version") == (0, f"sparsetrain {sparsetrain.__version__}\n", "")


def test_cfg_job_prints_the_configuration(shell: Shell) -> None:
    for words in (["--cfg", "job"], ["--cfg=job"], ["-c", "job"]):
        status, out, err = shell.run("pretrain", *words, "optimizer.lr=0.125")
        assert (status, err) == (0, "")
        assert "  lr: 0.125\n" in out
    assert shell.listing() == []


# One run after the other.


def test_pretrain_finetune_prompt_generate_and_report(shell: Shell) -> None:
    status, out, err = shell.run("pretrain", *shell.tiny)
    assert (status, err) == (0, "")
    match = re.search(r"^run directory: (runs/pretrain-d32-L2-s0\.75-\S+)$", out, re.MULTILINE)
    assert match
    assert re.search(r"^pretrain: complete; loss_last \d", out, re.MULTILINE)
    start = f"init_from={match[1]}"
    assert "pretrain: already done in" in shell.run("pretrain", *shell.tiny)[1]
    steps = ["schedule.steps=3", "stage.batch_size=4"]
    for verb in ("finetune", "prompt"):
        status, out, err = shell.run(verb, start, *shell.task, *steps, f"run_dir={verb}")
        assert (status, err) == (0, "")
        assert re.search(rf"^{verb}: complete; accuracy .*ci95 \[", out, re.MULTILINE)
    status, out, err = shell.run("generate", "init_from=prompt", "prompt='Note 1'", "max_new_tokens=5")
    assert (status, err) == (0, "")
    assert out.startswith("Note 1")
    status, out, err = shell.run("report", "finetune")
    assert (status, err) == (0, "")
    for word in ("stage", "finetune", "complete", "accuracy", "majority"):
        assert word in out


def test_data_prepares_a_corpus_and_finds_it_again(shell: Shell) -> None:
    words = [word for word in shell.tiny if word.startswith("data.")]
    status, out, err = shell.run("data", *words, *shell.task)
    assert (status, err) == (0, "")
    for part in ("corpus: built in", "train: ", "validation: ", "licence: ", "task: pubmedqa", "training text: 0"):
        assert part in out
    assert "found in cache" in shell.run("data", *words)[1]


def test_pipeline_and_its_report(shell: Shell) -> None:
    short = [
        f"pipeline.{stage}.{key}"
        for stage in ("finetune", "prompt")
        for key in ("schedule.steps=2", "stage.batch_size=4")
    ]
    words = [*shell.tiny, *shell.task, *short, "pipeline.prompt.n_tokens=2", "run_dir=p", "pipeline.sparsities=[0.5]"]
    status, out, err = shell.run("pipeline", *words)
    assert (status, err) == (0, "")
    page = shell.home / "p" / "report.html"
    assert f"report: {page}" in out
    page.unlink()
    status, out, err = shell.run("report", "p")
    assert (status, err) == (0, "")
    assert "sparse-0.5" in out
    assert page.exists()  # written again
    assert "pipeline: already done" in shell.run("pipeline", *words)[1]


def test_masks_evolve_and_are_inspected(shell: Shell) -> None:
    run = shell.trained("sparsity=rigl", "sparsity.evolution.every=1", "sparsity.evolution.stop=1.0")
    status, out, err = shell.run("mask", "inspect", str(run))
    assert (status, err) == (0, "")
    assert "blocks.0.attn.qkv" in out
    assert f"picture: {run / 'masks.png'}" in out.replace("\n", "")
    status, out, err = shell.run("mask", "inspect", str(run), "picture=mine.png")
    assert (status, err) == (0, "")
    assert (shell.home / "mine.png").exists()
    assert "RigL" in shell.run("report", str(run))[1]


def test_report_of_an_unfinished_run_says_so(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 2, signal.SIGTERM)
        shell.run("pretrain", *shell.tiny, "run_dir=run")
    status, out, err = shell.run("report", "run")
    assert (status, err) == (0, "")
    assert "not finished" in out


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int, number: int) -> None:
    true_loss, calls = Transformer.loss, 0

    def loss(self: Transformer, *arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return true_loss(self, *arguments)

    monkeypatch.setattr(Transformer, "loss", loss)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_with_its_status_and_the_command_that_goes_on(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, number: int, expected: int
) -> None:
    words = ["pretrain", *shell.tiny, "run_dir=a run"]
    with monkeypatch.context() as patch:
        stop_at(patch, 2, number)
        status, _, err = shell.run(*words)
    assert status == expected
    assert err.count("\n") == 1
    assert "stopped after step 2 of 3, saved in a run; the same command goes on from there: sparsetrain pretrain" in err
    assert err.endswith("'run_dir=a run'\n")
    status, out, _ = shell.run(*words)
    assert status == 0
    assert "resuming after step 2 of 3" in out


def test_ctrl_c_outside_of_the_loop_is_one_line(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["sparsetrain.stages.pretrain"], "prepare", interrupted)
    status, _, err = shell.run("pretrain", *shell.tiny)
    assert (status, err.count("\n")) == (130, 1)
    assert "interrupted" in err


def test_a_diverged_run_ends_with_1_and_does_so_again(shell: Shell) -> None:
    words = ["pretrain", *shell.tiny, "optimizer.lr=1e30", "optimizer.clip=0", "run_dir=run"]
    for _ in range(2):
        status, _, err = shell.run(*words)
        assert (status, err.count("\n")) == (1, 1)
        assert err.startswith("sparsetrain: diverged: ")
        assert json.loads((shell.home / "run" / "result.json").read_text())["status"] == "diverged"
    status, out, _ = shell.run("report", "run")
    assert status == 0
    assert "diverged" in out


# Sweeps.


def runs_of(shell: Shell) -> dict[tuple[float, float], str]:
    found = {}
    for path in sorted((shell.home / "runs").glob("pretrain-*/result.json")):
        values = json.loads(path.read_text())
        found[values["sparsity"], values["lr"]] = values["status"]
    return found


def test_a_sweep_runs_every_point_once(shell: Shell) -> None:
    words = ["pretrain", "-m", *shell.tiny, "sparsity.sparsity=0,0.5", "optimizer.lr=1e-3,2e-3"]
    status, out, err = shell.run(*words)
    assert (status, err) == (0, "")
    assert runs_of(shell) == {(s, lr): "complete" for s in (0.0, 0.5) for lr in (1e-3, 2e-3)}
    assert out.count("pretrain: complete") == 4
    before = {path: path.stat().st_mtime_ns for path in shell.home.glob("runs/pretrain-*/**/*") if path.is_file()}
    status, out, err = shell.run(*words)
    assert (status, err) == (0, "")
    assert out.count("already done") == 4
    assert {p: p.stat().st_mtime_ns for p in shell.home.glob("runs/pretrain-*/**/*") if p.is_file()} == before
    assert [path.name for path in shell.home.iterdir()] == ["runs"]


def test_a_sweep_goes_on_after_a_bad_point(shell: Shell) -> None:
    words = [*shell.tiny, "sparsity.sparsity=0.5,1.5,0"]
    status, out, err = shell.run("pretrain", "-m", *words)
    assert (status, err.count("\n")) == (2, 1), err
    assert "sparsity=1.5" in err
    assert set(runs_of(shell)) == {(0.5, 8e-3), (0.0, 8e-3)}
    assert out.count("pretrain: complete") == 2


def test_a_sweep_goes_on_after_a_diverged_point(shell: Shell) -> None:
    status, _, err = shell.run("pretrain", "-m", *shell.tiny, "optimizer.clip=0", "optimizer.lr=1e30,1e-3")
    assert (status, err.count("\n")) == (1, 1), err
    assert runs_of(shell) == {(0.75, 1e30): "diverged", (0.75, 1e-3): "complete"}


def test_a_sweep_that_is_stopped_goes_on_later(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["pretrain", "-m", *shell.tiny, "seed=0,1"]
    with monkeypatch.context() as patch:
        stop_at(patch, 2, signal.SIGINT)
        status, _, err = shell.run(*words)
    assert status == 130
    assert "Traceback" not in err
    status, out, err = shell.run(*words)
    assert (status, err) == (0, "")
    assert "resuming after step 2 of 3" in out
    assert out.count("pretrain: complete") == 2
