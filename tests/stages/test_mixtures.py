"""Runs on several named corpora: what each phase reads, resumed bit for bit, and scored corpus by corpus."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from runs import CLOCKS, assert_same_run, records, stop_after
from shell import Shell

from sparsetrain.cli.resolve import load
from sparsetrain.data import prepare_corpora
from sparsetrain.errors import UserError
from sparsetrain.runs.checkpoint import load_checkpoint
from sparsetrain.stages import RunResult, pretrain
from sparsetrain.stages.plan import plan_of
from sparsetrain.training.state import Interrupted

Phases = list[dict[str, Any]]
Train = Callable[..., RunResult]

# Outputs of these tiny layers may lose all weights.
pytestmark = pytest.mark.filterwarnings("ignore:.* have no weight")

# Two corpora whose weights, context, batch size, rate and density change together.
MIXED: Phases = [
    {"tokens": 192, "density": 0.25, "mixture": {"prose": 1.0}},
    {"tokens": 192, "context": 32, "batch_size": 2, "mixture": {"prose": 0.37, "digits": 0.63}},
    {"tokens": 384, "context": 32, "density": 0.4, "schedule": {"name": "cosine", "warmup_steps": 2}},
    {"tokens": 384, "batch_size": 8, "density": 0.6, "mixture": {"prose": 1, "digits": 4}},
]


@pytest.fixture
def texts(notes: Path, tmp_path: Path) -> dict[str, Any]:
    """The settings of two named corpora."""
    draw, path = random.Random(1), tmp_path / "digits.txt"
    path.write_text("\n\n".join(" ".join(str(draw.randrange(10**6)) for _ in range(24)) for _ in range(80)))
    sources = {"prose": {"path": str(notes)}, "digits": {"path": str(path), "max_epochs": 2}}
    return {"data.path": None, "data.sources": sources}


def test_a_run_on_a_mixture_stopped_anywhere_is_the_same_run(
    texts: dict[str, Any], train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train("whole", MIXED, texts)
    for step in range(1, 12):
        with monkeypatch.context() as patch:
            stop_after(patch, 1)
            with pytest.raises(Interrupted, match=f"stopped after step {step} of 12"):
                train("cut", MIXED, texts)
    assert train("cut", MIXED, texts).complete
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    first, second = (load_checkpoint(tmp_path / name / "checkpoints").state for name in ("whole", "cut"))
    assert first | dict.fromkeys(CLOCKS) == second | dict.fromkeys(CLOCKS)
    # Phase 2 has no weights of its own: it takes those of the run, which are the tokens of the corpora.
    corpora = result["corpora"]
    assert corpora["prose"]["tokens"] + corpora["digits"]["tokens"] == 1152
    final = records(tmp_path / "whole")[-1]
    for name in ("prose", "digits"):
        assert corpora[name]["val_loss"] == final[f"val_loss_{name}"]
        assert 0.0 < corpora[name]["epochs"] < 1.0
    assert min(final["val_loss_prose"], final["val_loss_digits"]) < final["val_loss"]
    assert final["val_loss"] < max(final["val_loss_prose"], final["val_loss_digits"])


def test_the_weights_of_a_mixture_are_part_of_a_run(
    texts: dict[str, Any], tiny: Callable[..., Any], train: Train, tmp_path: Path
) -> None:
    one = tiny(None, {**texts, "data.mixture": {"prose": 1, "digits": 1}}, runs_dir=tmp_path)
    other = tiny(None, {**texts, "data.mixture": {"prose": 2, "digits": 1}}, runs_dir=tmp_path)
    prepare_corpora(one.data, progress=False)
    assert plan_of(one).runs[0].directory != plan_of(other).runs[0].directory
    # What the reading is refused for does not make another run.
    limited = {**texts["data.sources"], "digits": {**texts["data.sources"]["digits"], "max_epochs": 5}}
    same = tiny(None, {**texts, "data.sources": limited, "data.mixture": {"prose": 1, "digits": 1}}, runs_dir=tmp_path)
    assert plan_of(same).runs[0].directory == plan_of(one).runs[0].directory


def test_a_plan_says_what_each_phase_reads(texts: dict[str, Any], notes: Path, shell: Shell) -> None:
    words = [
        *("model=tiny", "sparsity=dense", "data.context=16", "budget.batch_size=4", "data.tokenizer=bytes"),
        f"data.sources={{prose: {{path: {notes}}}, digits: {{path: {texts['data.sources']['digits']['path']}}}}}",
        "budget.phases=[{tokens: 640, mixture: {prose: 1}}, {tokens: 6400, mixture: {prose: 1, digits: 3}}]",
    ]
    assert shell.run("data", *(word for word in words if word.startswith("data")))[0] == 0
    status, out, err = shell.run("plan", "--step", "12", "pretrain", *words)
    assert status == 0, err
    lines = out.splitlines()
    assert "phase 0 reads prose 640 tokens (100.0%, " in "\n".join(lines)
    assert any(line.startswith("phase 1 reads prose 1,600 tokens (25.0%, ") for line in lines)
    assert any("digits 4,800 tokens (75.0%" in line for line in lines)
    at = lines.index("step 12 reads 4 samples, which begin in these documents:")
    named = [line.strip().split(": ", 2) for line in lines[at + 1 :]]
    names = [name for name, *_ in named]
    assert len(names) == 4
    assert 2 <= names.count("digits") <= 4
    assert names.count("digits") + names.count("prose") == 4
    for name, _, beginning in named:
        assert any(character.isdigit() for character in beginning) or name == "prose"
    corpora = prepare_corpora(load("pretrain", words).data, progress=False)
    assert all(document in corpora[name].train_ids() for name, document, _ in named)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.mixture": {"prose": 0}}, r"data.mixture={prose: 0, digits: 0} must have a positive and finite sum"),
        ({"data.mixture": {"prse": 1}}, r"data.mixture.prse is no corpus \(did you mean 'prose'\?\)"),
        (
            {"data.sources.digits.max_epochs": 1e-6},
            r"digits 0.0\d+ times \([\d,]+ tokens, and it has [\d,]+\): give it",
        ),
        ({"data.sources.digits.path": "absent.txt"}, "^data.sources.digits: path=absent.txt: no such file"),
        ({"data.sources.digits.max_documents": 1}, r"data.sources.digits.max_documents=1 is too small"),
        ({"data.sources.digits.sise": 1}, r"data.sources.digits.sise is no setting"),
        ({"data.sources.Digits": {}}, "the name 'Digits' must be small letters, digits and underscores"),
        ({"data.sources.digits": {"name": "hub"}}, r"^data.sources.digits.name=hub needs data.hub_name"),
        (
            {"data.context": 20_000, "model.max_context": 20_000},
            r"^data.sources.digits: the training text holds \d+ tokens, fewer than context",
        ),
        ({"data.path": "x.txt"}, r"data.path=x.txt cannot be combined with data.sources"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_one_line(
    changes: dict[str, Any], message: str, texts: dict[str, Any], tiny: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        pretrain(tiny(None, {**texts, **changes}, runs_dir=tmp_path), Console(file=io.StringIO()))
    assert "\n" not in str(raised.value)


def test_a_phase_mixes_named_corpora_only(tiny: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"budget.phases\[0\].mixture={'prose': 1.0} needs data.sources"):
        tiny([{"share": 1.0, "mixture": {"prose": 1}}])
