"""Which run directory a configuration gets, when it is used again, and when it is refused."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparsetrain.data import Tokenizer
from sparsetrain.errors import UserError
from sparsetrain.stages import (
    FinetuneConfig,
    PretrainConfig,
    PromptConfig,
    RunResult,
    finetune,
    pretrain,
    prompt,
)
from sparsetrain.stages.config import as_plain, build, differences, fingerprint
from sparsetrain.stages.run import Origin, claimed

Configure = Callable[..., Any]


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_a_finished_run_is_skipped(sparse: RunResult, configure: Configure, screen: Console) -> None:
    before = {path: path.stat().st_mtime_ns for path in sparse.directory.rglob("*") if path.is_file()}
    again = pretrain(configure(PretrainConfig, run_dir=sparse.directory), screen)
    assert again.values == sparse.values
    assert f"pretrain: already done in {sparse.directory}" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert {path: path.stat().st_mtime_ns for path in sparse.directory.rglob("*") if path.is_file()} == before


def test_a_run_directory_of_another_configuration_is_refused(
    sparse: RunResult, configure: Configure, screen: Console
) -> None:
    with pytest.raises(UserError, match=r"holds a run with another configuration: optimizer\.lr=0\.1 \(there: 0\.004"):
        pretrain(configure(PretrainConfig, {"optimizer.lr": 0.1}, run_dir=sparse.directory), screen)
    # What does not change the result is no other configuration.
    changes = {"stage.log_every": 7, "stage.keep_last": 9}
    assert pretrain(configure(PretrainConfig, changes, run_dir=sparse.directory, threads=1), screen).complete


def test_a_run_directory_of_another_text_is_refused(
    configure: Configure, notes: Path, tmp_path: Path, screen: Console
) -> None:
    text = tmp_path / "notes.txt"
    shutil.copy(notes, text)
    config = configure(PretrainConfig, {"data.path": str(text)}, run_dir=tmp_path / "run")
    pretrain(config, screen)
    text.write_text(text.read_text() + "\n\nOne paragraph more.")
    with pytest.raises(UserError, match=r"another configuration: corpus=file-\w+ \(there: file-\w+\)"):
        pretrain(config, screen)


def test_two_processes_on_one_run_directory_are_refused(configure: Configure, tmp_path: Path, screen: Console) -> None:
    config = configure(PretrainConfig, run_dir=tmp_path / "run")
    holder = (
        "import fcntl, os, sys\n"
        "lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    (tmp_path / "run").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "run" / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"run_dir=.*/run is in use by another process; wait for it or choose"):
            pretrain(config, screen)
        assert listing(tmp_path / "run") == [".lock"]
        other.communicate("")
    assert pretrain(config, screen).complete


def test_what_a_killed_run_left_is_gone_after_the_next(
    sparse: RunResult, configure: Configure, tmp_path: Path, screen: Console
) -> None:
    """Also in the directory of a run that is done, in its checkpoints, and in the cache."""
    (corpora,) = tmp_path.rglob("corpora")
    before = listing(sparse.directory), listing(corpora)
    last = max((sparse.directory / "checkpoints").glob("step-*"))
    for kind in (".removing-", ".writing-", ".replaced-"):
        shutil.copytree(last, last.with_name(kind + last.name))
    (last.parent / ".latest").touch()
    (sparse.directory / ".train_ids.txt.abcdefgh.part").touch()
    (corpora / ".file-0.abcdefgh.part").mkdir()
    (corpora / ".file-0.abcdefgh.part" / "train.bin").touch()
    assert pretrain(configure(PretrainConfig, run_dir=sparse.directory), screen).complete
    assert (listing(sparse.directory), listing(corpora)) == before


def fails_inside(directory: Path, config: PretrainConfig) -> None:
    with claimed(directory, config, Origin("text", None, Tokenizer.bytes(), set())):
        raise UserError("a mistake")


def test_a_mistake_leaves_no_trace_and_the_directory_can_be_used(configure: Configure, tmp_path: Path) -> None:
    config = configure(PretrainConfig)
    with pytest.raises(UserError, match="a mistake"):
        fails_inside(tmp_path / "deep" / "run", config)
    assert listing(tmp_path) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()  # what was there before stays
    with pytest.raises(UserError, match="a mistake"):
        fails_inside(tmp_path / "mine", config)
    assert "mine/file" in listing(tmp_path)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            PretrainConfig,
            {"sparsity.sparsity": 0.9999},
            "blocks.0.attn.qkv: .*leaves no weight at all in a 96x32 matrix",
        ),
        (FinetuneConfig, {"task.path": "nowhere"}, "task.path=nowhere: no ori_pqal.json there"),
        (FinetuneConfig, {"data.context": 4}, "context=4 leaves no room for a source"),
        (PretrainConfig, {"schedule.steps": None}, "set schedule.steps, schedule.tokens or stage.epochs"),
        (
            PretrainConfig,
            {"model.positions": "learned", "data.context": 100},
            "data.context=100 is longer than model.max_context=64",
        ),
        (PretrainConfig, {"data.context": 100_000}, r"fewer than context \+ 1 = 100001"),
    ],
)
def test_what_is_found_late_leaves_no_directory(
    configure: Configure, tmp_path: Path, screen: Console, kind: type, changes: dict[str, Any], message: str
) -> None:
    start = {PretrainConfig: pretrain, FinetuneConfig: finetune}[kind]
    with pytest.raises(UserError, match=message) as caught:
        start(configure(kind, changes, run_dir=tmp_path / "runs" / "x"), screen)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


# What identifies a run.


@pytest.mark.parametrize(
    "changes",
    [
        {"stage.log_every": 3},
        {"stage.checkpoint_every": 1},
        {"stage.keep_last": 7},
        {"device": "cpu"},
        {"threads": 1},
        {"run_dir": "elsewhere"},
        {"runs_dir": "others"},
    ],
    ids=str,
)
def test_incidental_fields_do_not_make_another_run(configure: Configure, changes: dict[str, Any]) -> None:
    assert fingerprint(configure(PretrainConfig, changes), "text") == fingerprint(configure(PretrainConfig), "text")


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"data_seed": 1},
        {"optimizer.lr": 1e-3},
        {"schedule.steps": 13},
        {"sparsity.sparsity": 0.5},
        {"sparsity.groups": [{"match": "*", "sparsity": 0.5}]},
        {"model.bias": True},
        {"stage.batch_size": 8},
        {"stage.precision": "bf16"},
        {"data.context": 32},
        {"parameterization.base_width": 32},
    ],
    ids=str,
)
def test_essential_fields_make_another_run(configure: Configure, changes: dict[str, Any]) -> None:
    assert fingerprint(configure(PretrainConfig, changes), "text") != fingerprint(configure(PretrainConfig), "text")


def test_a_setting_that_came_later_makes_another_run_only_where_it_says_something_else() -> None:
    model = {"d_model": 64, "n_layers": 2, "n_heads": 2}
    rigl = {"sparsity": 0.9, "evolution": {"rule": "rigl", "drop_schedule": "cosine"}}
    # Those of runs that were made before there was a setting more.
    for sparsity, known in (({}, "a0642eb9"), (rigl, "a4fd7ffc")):
        settings = {"model": model, "schedule": {"steps": 12}, "sparsity": sparsity}
        assert fingerprint(build(PretrainConfig, settings), "text") == known
    ours = as_plain(build(PretrainConfig, settings))
    before = copy.deepcopy(ours)
    del before["sparsity"]["evolution"]["grown_moments"]
    assert differences(ours, before) == differences(before, ours) == []
    ours["sparsity"]["evolution"]["grown_moments"] = "mean"
    assert fingerprint(build(PretrainConfig, ours), "text") != known
    assert differences(ours, before) == ["sparsity.evolution.grown_moments=mean (there: zero)"]


def test_verb_and_corpus_make_another_run(configure: Configure) -> None:
    config = configure(PretrainConfig)
    assert fingerprint(config, "text") != fingerprint(config, "other text")
    assert fingerprint(config, "text", "step-00000012-ab") != fingerprint(config, "text")
    assert fingerprint(config, "text", "step-00000012-ab") != fingerprint(config, "text", "step-00000012-cd")
    assert fingerprint(configure(FinetuneConfig), "text") != fingerprint(configure(PromptConfig), "text")


def test_the_default_directory_says_what_it_holds(
    configure: Configure, tmp_path: Path, screen: Console, notes: Path
) -> None:
    text = tmp_path / "notes.txt"
    shutil.copy(notes, text)
    changes = {"data.path": str(text), "schedule.steps": 1}
    one = pretrain(configure(PretrainConfig, changes, runs_dir=tmp_path / "runs"), screen)
    assert one.directory.name.startswith("pretrain-d32-L2-s0.75-lr0.004-seed0-")
    assert one.directory.parent == tmp_path / "runs"
    shorter = {**changes, "data.context": 32}
    assert pretrain(configure(PretrainConfig, shorter, runs_dir=tmp_path / "runs"), screen).directory != one.directory
    text.write_text(text.read_text() + "\n\nOne paragraph more.")
    assert pretrain(configure(PretrainConfig, changes, runs_dir=tmp_path / "runs"), screen).directory != one.directory


def test_a_retrained_source_makes_another_run(
    sparse: RunResult, configure: Configure, tmp_path: Path, screen: Console
) -> None:
    config = configure(FinetuneConfig, runs_dir=tmp_path / "runs", init_from=sparse.directory)
    first = finetune(config, screen)
    assert finetune(config, screen).directory == first.directory  # the same weights: already done
    shutil.rmtree(sparse.directory)
    pretrain(configure(PretrainConfig, {"optimizer.lr": 1e-3}, run_dir=sparse.directory), screen)
    second = finetune(config, screen)
    assert second.directory != first.directory
    assert second["source"] != first["source"]
    with pytest.raises(UserError, match="holds a run with another configuration: source="):
        finetune(configure(FinetuneConfig, run_dir=first.directory, init_from=sparse.directory), screen)


def test_a_run_can_be_used_when_its_corpus_is_gone(
    configure: Configure, tmp_path: Path, screen: Console, notes: Path
) -> None:
    own = tmp_path / "own.txt"
    shutil.copy(notes, own)
    text = {"data.path": str(own)}
    trained = pretrain(configure(PretrainConfig, text, run_dir=tmp_path / "trained"), screen)
    own.unlink()
    tuned = finetune(configure(FinetuneConfig, text, run_dir=tmp_path / "t", init_from=trained.directory), screen)
    assert tuned.complete
    assert prompt(configure(PromptConfig, text, run_dir=tmp_path / "p", init_from=tuned.directory), screen).complete


def test_starting_from_an_unfinished_run_is_said(
    sparse: RunResult, configure: Configure, tmp_path: Path, screen: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    (sparse.directory / "result.json").unlink()
    finetune(configure(FinetuneConfig, run_dir=tmp_path / "tuned", init_from=sparse.directory), screen)
    assert "sparse is not finished; its weights are those of step 12" in capsys.readouterr().err
