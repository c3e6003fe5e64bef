"""Verbs as functions: a call makes the run that its command makes, with the same name and the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import assert_same_run
from shell import Shell

import sparsetrain as st
from sparsetrain.cli.calls import words
from sparsetrain.cli.resolve import load


def test_a_call_and_its_command_make_the_same_run(shell: Shell, capfd: pytest.CaptureFixture[str]) -> None:
    shell.trained("sparsity.sparsity=0.5", "optimizer.lr=2e-3", run_dir="typed")
    capfd.readouterr()
    notes = shell.tiny[-1].removeprefix("data.path=")
    run = st.pretrain(
        {"parameterization.base_width": 16, "loop.eval_sequences": 4},
        model="tiny",
        data=Path(notes),
        tokenizer="bytes",
        context=48,
        batch_size=4,
        steps=3,
        sparsity=0.5,
        lr=2e-3,
        run_dir="called",
        quiet=True,
    )
    assert capfd.readouterr() == ("", "")
    assert_same_run(Path("typed"), Path("called"))
    assert isinstance(run, st.RunResult)
    assert (run.directory, run["status"], run.complete) == (Path("called"), "complete", True)
    assert [record["step"] for record in run.metrics if "lr" in record] == [1, 3]
    assert "pretrain: already done" in shell.run("pretrain", *shell.tiny, *TYPED, "run_dir=called")[1]  # its identity
    typed = shell.run("generate", "init_from=typed", "prompt='a, b'", "max_new_tokens=3", "temperature=0")[1]
    text = st.generate(init_from=run.directory, prompt="a, b", max_new_tokens=3, temperature=0)
    assert f"{text}\n" == typed
    tuned = st.finetune(
        {"task.path": shell.task[1].removeprefix("task.path=")},
        init_from="called",
        task="pubmedqa",
        budget={"steps": 2, "batch_size": 4},
        run_dir="tuned",
        quiet=True,
    )
    assert 0.0 <= tuned["accuracy"] <= 1.0
    assert tuned.metrics[-1]["step"] == 2


TYPED = ["sparsity.sparsity=0.5", "optimizer.lr=2e-3"]


def test_keywords_are_the_words_of_a_command() -> None:
    said = words(
        "pretrain",
        {"seed": 3},
        {
            "sparsity": "rigl",
            "model": {"d_model": 64, "mlp": "swiglu"},
            "data": {"sources": {"a": {"path": "it's, a"}}, "context": 8},
            "phases": [{"share": 1.0, "context": 8}],
            "observe": ["noise_scale"],
            "data_seed": None,
            "force": True,
        },
    )
    config = load("pretrain", said)
    assert (config.seed, config.data_seed, config.force, config.observe) == (3, None, True, ["noise_scale"])
    assert (config.sparsity.evolution.rule, config.model["d_model"], config.model["mlp"]) == ("rigl", 64, "swiglu")
    assert (config.data.members()["a"].path, config.data.context) == ("it's, a", 8)
    assert (config.budget.phases[0].share, config.budget.phases[0].context) == (1.0, 8)
    prompt = "'quoted', ${seed} and 3"
    assert load("generate", words("generate", None, {"init_from": "x", "prompt": prompt})).prompt == prompt


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"vocab_size": 3}, "vocab_size could be model.vocab_size or data.vocab_size; give it as {'model.vocab_size'"),
        ({"n_tokens": 3}, "pretrain has no setting 'n_tokens'; it is one of prompt"),
        ({"stps": 3}, r"pretrain has no setting 'stps' (did you mean 'steps'?)"),
        ({"steps": 3, "budget": {"steps": 4}}, "pretrain: budget.steps is given twice"),
        ({"lr": object()}, "is no value of a setting"),
        ({"lr": -1.0}, "optimizer.lr=-1.0 must be above 0"),
        ({"model": "dmo"}, "model=dmo is not one of"),
        ({"model": {"d_modle": 3}}, "(did you mean 'model.d_model'?)"),
    ],
)
def test_a_wrong_keyword_is_refused(given: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(st.UserError) as refused:
        st.pretrain(**given)
    assert said in str(refused.value)
