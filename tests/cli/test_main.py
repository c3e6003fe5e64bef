"""The command line as users call it: exit statuses, one-line messages, files on disk, sweeps."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
from typing import Any

import pytest
import yaml
from runs import on_loss, send
from shell import Shell

import sparsetrain
from sparsetrain.cli.checks import as_typed, check
from sparsetrain.cli.resolve import load
from sparsetrain.cli.verb import GROUPS
from sparsetrain.cli.verbs import VERBS, spoken, typed, with_settings

# Help texts and configurations.


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb(shell: Shell, words: list[str]) -> None:
    status, out, err = shell.run(*words)
    assert (status, err) == (0, "")
    used = {verb.group for verb in VERBS.values()}
    headings = [out.index(f"\n{heading}:\n") for group, heading in GROUPS.items() if group in used]
    assert headings == sorted(headings)
    assert max(map(len, out.splitlines())) <= 80
    joined = re.sub(r"\n {13,}", " ", out)
    for name, verb in VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(verb.about)}$", joined, re.MULTILINE)


@pytest.mark.parametrize("verb", list(VERBS))
def test_help_of_a_verb_has_examples_and_settings(shell: Shell, verb: str) -> None:
    status, out, err = shell.run(verb, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: sparsetrain {spoken(verb)} ")
    whole = " ".join(out.replace("\\\n", " ").split())
    assert " ".join(VERBS[verb].about.split()) in whole
    assert all(" ".join(example.split()) in whole for example in VERBS[verb].examples)
    long = [line for line in out.splitlines() if len(line) > 80]
    assert all(max(map(len, line.split("'"))) > 40 or len(line.split()) <= 2 for line in long), long  # quoted words
    if verb == "sweep":
        assert shell.run("help", verb) == shell.run("--help", verb) == (0, out, "")
    if verb in ("pretrain", "pipeline"):
        assert re.search(r"^  optimizer\.lr = 0\.008  number above 0$", out, re.MULTILINE)
        assert re.search(r"^  model +btlm-3b, cerebras-111m, crystal, demo", out, re.MULTILINE)
        assert out.index("  optimizer.lr = ") < out.index("  model.n_heads = ")  # the most used ones come first


@pytest.mark.parametrize("verb", with_settings())
def test_the_examples_of_help_are_valid(verb: str, shell: Shell) -> None:
    for example in VERBS[verb].examples:
        program, *said = shlex.split(example)
        name, words = typed(said)
        assert (program, name) == ("sparsetrain", verb)
        sweep = "-m" in words or VERBS[verb].together
        if "init_from=RUN_DIR" in words or sweep:
            check(verb, as_typed(verb, [word for word in words if word != "-m"], sweep), sweep)
        else:
            load(verb, words)


def test_version(shell: Shell) -> None:
    assert shell.run("--version") == (0, f"sparsetrain {sparsetrain.__version__}\n", "")


def test_cfg_job_prints_the_configuration(shell: Shell) -> None:
    for words in (["--cfg", "job"], ["--cfg=job"], ["-c", "job"]):
        status, out, err = shell.run("pretrain", *words, "optimizer.lr=0.125")
        assert (status, err) == (0, "")
        assert "  lr: 0.125\n" in out
    assert shell.listing() == []


def test_cfg_job_prints_the_length_and_the_arms_that_count(shell: Shell) -> None:
    """Typed values replace those of the experiment, in the printed configuration as in the run."""
    words = [
        "experiment=demo",
        "budget.steps=7",
        "pipeline.stages.finetune.budget.steps=3",
        "pipeline.arms={seed:[1,2]}",
    ]
    status, out, err = shell.run("pipeline", "--cfg", "job", *words)
    assert (status, err) == (0, "")
    shown, run = yaml.safe_load(out), load("pipeline", words)
    assert (shown["budget"]["steps"], shown["budget"]["tokens"]) == (run.budget.steps, run.budget.tokens) == (7, None)
    assert shown["pipeline"]["arms"] == {"seed": [1, 2]}
    assert [arm.name for arm in run.arms] == ["seed-1", "seed-2"]
    budgets = [run.stage_config(stage, run.arms[0]).budget for stage in run.stages]
    assert [(budget.steps, budget.epochs) for budget in budgets] == [(7, None), (3, None), (None, 6), (None, 6)]
    assert [stage.get("budget", {}).get("epochs") for stage in shown["pipeline"]["stages"]] == [None, None, 6, 6]


# One run after the other.


def test_pretrain_finetune_prompt_generate_and_report(shell: Shell) -> None:
    status, out, err = shell.run("pretrain", *shell.tiny)
    assert (status, err) == (0, "")
    match = re.search(r"^run directory: (runs/pretrain-d32-L2-s0\.75-\S+)$", out, re.MULTILINE)
    assert match
    assert re.search(r"^pretrain: complete; loss_last \d", out, re.MULTILINE)
    start = f"init_from={match[1]}"
    assert "pretrain: already done in" in shell.run("pretrain", *shell.tiny)[1]
    steps = ["budget.steps=3", "budget.batch_size=4"]
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
        f"pipeline.stages.{stage}.{key}"
        for stage in ("finetune", "prompt", "scratch")
        for key in ("budget.steps=2", "budget.batch_size=4")
    ]
    words = [
        *shell.tiny,
        *shell.task,
        *short,
        "pipeline.stages.prompt.n_tokens=2",
        "run_dir=p",
        "pipeline.arms={sparsity.sparsity:[0.5]}",
    ]
    status, out, err = shell.run("pipeline", *words)
    assert (status, err) == (0, "")
    page = shell.home / "p" / "report.html"
    assert f"report: {page}" in out
    page.unlink()
    status, out, err = shell.run("report", "p")
    assert (status, err) == (0, "")
    assert "sparse-0.5" in out
    assert page.exists()  # written again
    status, out, err = shell.run("report", "p", "--out", "table")
    assert (status, err) == (0, "")
    assert "4 finished runs, 0 unfinished" in out
    assert {path.name for path in (shell.home / "table").iterdir()} == {"results.csv", "figure.png"}
    status, again, err = shell.run("report", "table/results.csv")
    assert (status, err) == (0, "")
    assert again == out.partition("written: ")[0]
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
    status, out, err = shell.run("report", str(run.parent), "--out", "table")
    assert (status, err) == (0, "")
    assert "rigl     0 seeds beside static: no verdict" in out
    assert (shell.home / "table" / "figure.png").exists()


def test_report_of_an_unfinished_run_says_so(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        on_loss(patch, 2, send(signal.SIGTERM))
        shell.run("pretrain", *shell.tiny, "run_dir=run")
    status, out, err = shell.run("report", "run")
    assert (status, err) == (0, "")
    assert "not finished" in out


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_with_its_status_and_the_command_that_goes_on(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, number: int, expected: int
) -> None:
    words = ["pretrain", *shell.tiny, "run_dir=a run"]
    with monkeypatch.context() as patch:
        on_loss(patch, 2, send(number))
        status, _, err = shell.run(*words)
    assert status == expected
    assert err.count("\n") == 1
    assert "stopped after step 2 of 3, saved in a run; the same command resumes it: sparsetrain pretrain" in err
    assert err.endswith("'run_dir=a run'\n")
    status, out, _ = shell.run(*words)
    assert status == 0
    assert "resuming after step 2 of 3" in out


def test_ctrl_c_outside_of_the_loop_is_one_line(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["sparsetrain.stages.pretrain"], "prepare_corpora", interrupted)
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
        on_loss(patch, 2, send(signal.SIGINT))
        status, _, err = shell.run(*words)
    assert status == 130
    assert "Traceback" not in err
    status, out, err = shell.run(*words)
    assert (status, err) == (0, "")
    assert "resuming after step 2 of 3" in out
    assert out.count("pretrain: complete") == 2
