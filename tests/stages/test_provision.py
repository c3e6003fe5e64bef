"""`sparsetrain provision`: budgets, the Pareto set, hyperparameters and commands, against simulate and suggest."""

from __future__ import annotations

import csv
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sparsetrain as st
from sparsetrain.cli import main
from sparsetrain.cli.resolve import load
from sparsetrain.cost.flops import parameter_count
from sparsetrain.cost.hardware import Machine
from sparsetrain.cost.simulate import simulate
from sparsetrain.errors import UserError
from sparsetrain.scaling.law import LossLaw, Quantity
from sparsetrain.stages.config import model_config
from sparsetrain.stages.hidden import hidden_of_run
from sparsetrain.studies.provision import Provision, lines, provisioned, thinned
from sparsetrain.studies.provision_rows import Row
from sparsetrain.studies.provision_search import Search, search
from sparsetrain.studies.suggest import SuggestConfig, suggestion

SMALL = ["data.tokenizer=bytes", "data.context=64", "model=tiny", "d_head=16", "parameterization.base_width=32"]
GRID = ["width=[32,64,128,256]", "depth=[1,2,4]", "batch=[4,8,16,32]", "sparsities=[0,0.5,0.9]"]
COLUMNS = 100


def law(path: Path, per: str = "nonzero", **more: Any) -> str:
    """Write a law of loss over the hidden nonzeros or weights, with small models in its range."""
    LossLaw(
        parameters={"floor": 1.0, "a": 60.0, "b": 400.0, "alpha": 0.4, "beta": 0.4},
        kind="loss",
        inputs=(Quantity("parameters", f"hidden {per}s"), Quantity("tokens", "tokens")),
        output=Quantity("loss", "nats per token"),
        ranges=((1e2, 1e9), (1e4, 1e12)),
        source="made up for a test",
        **more,
    ).save(path)
    return f"laws={path}"


def shape(row: Row) -> st.ModelConfig:
    sizes: Any = row.model
    return st.ModelConfig(vocab_size=257, max_context=64, **sizes)


def answer(tmp_path: Path, *words: str, per: str = "nonzero") -> tuple[Search, Provision]:
    laws = [] if any(word.startswith("laws=") for word in words) else [law(tmp_path / "law.yaml", per)]
    config = load("provision", [*SMALL, *GRID, *laws, *words])
    found, _, said = provisioned(config)
    return found, said


@pytest.mark.parametrize("budget", ["hours=0.05", "money=0.02", "flops=2e13"])
def test_the_budget_is_spent_and_never_exceeded(tmp_path: Path, budget: str) -> None:
    found, said = answer(tmp_path, budget, "machine=[zen4,h100]", "devices=[1,2]", "rows=100")
    kind, amount = budget.split("=")
    assert said.rows
    assert {row.machine for row in said.rows} <= {"zen4", "h100"}
    for row in said.rows:
        spent = {"hours": row.seconds / 3600.0, "money": row.cost, "flops": row.flops}[kind]
        assert spent is not None
        assert spent <= row.spend * float(amount)
        assert spent > row.spend * float(amount) * (1.0 - 1.0 / row.steps) * (1.0 - 1e-9)
        assert row.tokens == row.steps * row.batch_size * 64
        assert row.tokens_per_parameter >= 5.0
    spent_of_all = np.where(found.valid, found.steps * found.price[..., None], 0.0)
    assert (spent_of_all <= float(amount) * np.array(found.shares)).all()


def test_rows_are_what_simulate_says(tmp_path: Path) -> None:
    _, said = answer(tmp_path, "hours=0.02", "machine=h100", "threads=1", "dtype=float32", "spend=1", "rows=100")
    assert said.rows
    for row in said.rows:
        assert (row.devices, row.micro_batch) == (1, row.batch_size)
        config = shape(row)
        whole = simulate(config, "h100", 64, row.batch_size, row.tokens, density=1.0 - row.sparsity, threads=1)
        assert row.seconds == pytest.approx(whole.seconds, rel=1e-9)
        assert row.band == pytest.approx(whole.band, rel=1e-9)
        assert row.flops == pytest.approx(whole.flops, rel=1e-9)
        assert row.peak_memory == pytest.approx(whole.peak_memory, abs=1)
        assert (row.cost, row.energy) == pytest.approx((whole.cost, whole.energy), rel=1e-9)


@pytest.mark.parametrize("budget", ["hours=0.05", "money=0.02", "flops=2e13"])
def test_the_front_is_that_of_all_pairs(tmp_path: Path, budget: str) -> None:
    config = load(
        "provision", [*SMALL, *GRID, law(tmp_path / "law.yaml"), budget, "machine=[h100,zen4]", "devices=[1,4]"]
    )
    found, _, _ = search(config, 257)
    rows = found.objectives[found.valid.ravel()]
    front = found.objectives.reshape(*found.valid.shape, 3)
    places = found.front()
    for place in places:
        assert found.valid[place]
        better = (rows <= front[place] * (1.0 - 1e-8)).any(axis=1) & (rows <= front[place] * (1.0 + 1e-8)).all(axis=1)
        assert not better.any()
    # Whatever is not in the set is beaten by, or equal to, one of the set.
    kept = np.array([front[place] for place in places])
    for row in rows:
        assert (kept <= row * (1.0 + 1e-8)).all(axis=1).any()
    losses = [found.loss[place] for place in places]
    assert losses == sorted(losses)


def test_a_larger_budget_never_has_a_higher_loss(tmp_path: Path) -> None:
    best = [
        answer(tmp_path, f"hours={hours}", "machine=zen4")[1].rows[0].loss for hours in (0.005, 0.01, 0.02, 0.04, 0.08)
    ]
    assert best == sorted(best, reverse=True)
    assert best[0] > best[-1]


@pytest.mark.parametrize("per", ["weight", "nonzero"])
def test_losses_count_what_the_law_counts(tmp_path: Path, per: str) -> None:
    found, said = answer(tmp_path, "hours=0.05", "machine=zen4", "rows=100", per=per)
    assert said.law[0]["counts"] == f"hidden {per}s"
    values = found.laws[0].parameters
    for row in said.rows:
        counted = row.weights if per == "weight" else row.nonzeros
        assert row.parameters == counted
        by_size, by_tokens = values["a"] / counted ** values["alpha"], values["b"] / row.tokens ** values["beta"]
        assert row.loss == pytest.approx(values["floor"] + by_size + by_tokens, rel=1e-12)
        assert row.nonzeros == pytest.approx((1.0 - row.sparsity) * row.weights, rel=1e-3)
        assert row.inside
    if per == "weight":  # zeros cost a CPU nothing and count in full, so that the sparsest model has the lowest loss
        assert said.rows[0].sparsity == 0.9


def test_commands_train_what_was_planned(tmp_path: Path) -> None:
    _, said = answer(tmp_path, "hours=0.05", "machine=zen4", "rows=3")
    for row in said.rows:
        program, verb, *words = shlex.split(row.command)
        assert (program, verb) == ("sparsetrain", "pretrain")
        config = load(verb, [SMALL[0], SMALL[4], *words])
        hidden = hidden_of_run(config)
        assert config.data.context == 64
        assert config.model["d_model"] // config.model["n_heads"] == 16
        assert (hidden.weights, hidden.nonzeros) == (row.weights, row.nonzeros)
        assert (hidden.lr, hidden.weight_decay) == pytest.approx(
            (row.hidden_learning_rate, row.hidden_weight_decay), rel=1e-5
        )
        assert hidden.tau(row.steps) == pytest.approx(row.tau, rel=1e-5)
        assert config.budget.tokens == row.tokens
        # SμPar divides the base deviation by sqrt(m_d m_rho) (arXiv 2405.15743, table 1).
        factor = math.sqrt(row.model["d_model"] / 32 * (1.0 - row.sparsity))
        assert row.hidden_init_std == pytest.approx(row.init_std / factor)
        assert row.hidden_learning_rate == pytest.approx(row.learning_rate / factor**2)


def test_commands_say_of_which_family_the_models_are(tmp_path: Path) -> None:
    family = ["model=btlm-3b", "model.d_model=32", "model.n_layers=1", "model.n_heads=2", "model.d_ff=96"]
    words = ["data.tokenizer=bytes", "data.context=64", "parameterization.base_width=32", law(tmp_path / "law.yaml")]
    config = load("provision", [*words, *family, *GRID, "hours=0.1", "machine=zen4", "rows=1"])
    row = provisioned(config)[2].rows[0]
    assert row.model["d_ff"] == 3 * row.model["d_model"]
    trained = load("pretrain", ["data.tokenizer=bytes", words[2], *shlex.split(row.command)[2:]])
    made, meant = (model_config(each.model, 257) for each in (trained, config))
    assert made == replace(meant, **row.model)  # type: ignore[arg-type]


def test_weight_decay_is_that_of_suggest(tmp_path: Path) -> None:
    """`suggest` takes the batch of its own law; with that batch the decay is the same."""
    _, said = answer(tmp_path, "hours=0.05", "machine=zen4", "rows=1", "sparsities=0.5", "batch=8")
    row = said.rows[0]
    words = [f"model.{name}={value}" for name, value in row.model.items()]
    config = load("suggest", [*SMALL[:3], SMALL[4], *words, "sparsity.sparsity=0.5", f"budget.tokens={row.tokens}"])
    assert isinstance(config, SuggestConfig)
    suggested = {each.name: each for each in suggestion(config).values}
    assert suggested["timescale tau"].value == pytest.approx(row.tau)
    steps = suggested["steps"].value
    assert isinstance(steps, int)
    decay = suggested["weight decay"].value
    assert isinstance(decay, float)
    assert decay * steps == pytest.approx(row.weight_decay * row.steps, rel=1e-9)


def test_batches_stay_near_the_best_one(tmp_path: Path) -> None:
    found, said = answer(tmp_path, "flops=2e13", "machine=h100", "batch=[1,2,4,8,16,32,64,128,256]", "rows=100")
    for row in said.rows:
        assert row.batch_size * 64 <= 1.5 * st.batch_opt(row.tokens)
    assert not found.valid[..., -1, :].all()


def test_a_row_says_what_binds_and_what_neighbours_change(tmp_path: Path) -> None:
    found, said = answer(tmp_path, "hours=0.05", "machine=[zen4,h100]", "rows=100")
    for row in said.rows:
        assert row.binds in ("hours", "memory", "tokens", "grid")
        assert row.why.count("would") >= 1 or row.binds == "grid"
        assert row.why.endswith(".")
    text = list(lines(said))
    assert all(len(line) <= COLUMNS for line in text if "sparsetrain pretrain" not in line)
    assert len(found.front()) == said.pareto


def test_memory_binds_where_the_next_model_does_not_fit(tmp_path: Path) -> None:
    machine = tmp_path / "small.yaml"
    document = dict(Machine.load("zen4").document)
    *nearer, last = document["memory"]
    document["memory"] = [*nearer, {**last, "size": {**last["size"], "value": "24 MiB"}}]
    Machine.from_document(document, "small", "small").save(machine)
    _, said = answer(tmp_path, "hours=100", f"machine={machine}", "sparsities=0", "batch=8", "spend=1")
    assert said.rows[0].binds == "memory"
    assert said.rows[0].peak_memory <= said.rows[0].room == 24 * 2**20
    assert "GiB of it" in said.rows[0].why


def test_out_has_the_pareto_set_the_answer_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, *GRID, law(tmp_path / "law.yaml"), "hours=0.05", "machine=[zen4,h100]", "rows=2", "format=json"]
    assert main(["provision", *words, f"out={tmp_path / 'plan'}"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "plan" / "provision.json").read_text())
    assert set(printed) == {"budget", "law", "candidates", "valid", "pareto", "rows", "notes"}
    assert printed["budget"] == {"kind": "hours", "amount": 0.05, "unit": "h"}
    row = printed["rows"][0]
    kinds = {"machine": str, "devices": int, "model": dict, "sparsity": float, "tokens": int, "steps": int, "why": str}
    kinds |= {"seconds": float, "cost": float, "flops": float, "peak_memory": int, "loss": float, "command": str}
    assert all(type(row[name]) is kind for name, kind in kinds.items())
    with (tmp_path / "plan" / "results.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert len(table) == printed["pareto"]
    assert float(table[0]["loss"]) == row["loss"]
    assert (tmp_path / "plan" / "provision.png").read_bytes().startswith(b"\x89PNG")


def test_a_published_law_is_named_and_dense(tmp_path: Path) -> None:
    words = ["hours=100", "machine=h100", "laws=chinchilla", "width=[512,768]", "depth=[8,12]", "spend=1"]
    config = load("provision", [*SMALL, "batch=[256,512]", *words])
    _, _, said = provisioned(config)
    assert {row.sparsity for row in said.rows} == {0.0}
    assert any("2203.15556" in note and "law of their own" in note for note in said.notes)
    assert said.rows[0].parameters == parameter_count(shape(said.rows[0])).total


REFUSED = {
    "": "no budget: give exactly one of hours",
    "hours=1 money=1": "hours and money: give exactly one",
    "hours=nan": "hours=nan must be above 0 and finite",
    "money=-3": "money=-3.0 must be above 0 and finite",
    "flops=0": "flops=0.0 must be above 0 and finite",
    "hours=1 laws=null": "the loss needs a law",
    "hours=1 laws=missing.yaml": "missing.yaml",
    "hours=1 machine=h10": "machine='h10' is not one of",
    "hours=1 machine=[]": "machine=[] must have at least one value",
    "hours=1 sparsities=[0,1]": "sparsities=1 must be in [0, 1)",
    "hours=1 sparsities=[-0.5]": "sparsities=-0.5 must be in [0, 1)",
    "hours=1 spend=[2]": "spend=2 must be above 0 and at most 1",
    "hours=1 batch=[0]": "batch=0 must be a whole number",
    "hours=1 width=[100]": "width=100 is no multiple of d_head=16",
    "hours=1 width=[16]": "base_width=32 is wider than the model (width=16)",
    "hours=1 aspect=[3]": "aspect=[3] must be two numbers",
    "hours=1 tokens_per_parameter=0": "tokens_per_parameter=0.0 must be above 0",
    "hours=1 budget.tokens=5": "budget.tokens: the length of a run follows from hours",
    "hours=1 init_from=runs/x": "provision plans new models",
    "hours=1 devices=[8]": "no machine has links for so many",
    "hours=1 dtype=float8": "dtype='float8': zen4 has a peak rate for",
    "hours=1e-9": "pays for no candidate",
    "hours=1 data.context=100000000": "GiB are missing",
    "hours=1 rows=0": "rows=0 must be at least 1",
    "hours=1 sparsity.allocation=erk": "leave out allocation",
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_one_line(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [] if "laws=" in words else [law(tmp_path / "law.yaml")]
    grid = [entry for entry in (*GRID, "machine=zen4") if entry.partition("=")[0] not in words]
    assert main(["provision", *SMALL, *grid, *given, *words.split()]) == 2
    said = capsys.readouterr().err.strip()
    assert REFUSED[words] in said
    assert "\n" not in said


def test_two_laws_of_one_sparsity_are_refused(tmp_path: Path) -> None:
    law(tmp_path / "one.yaml", sparsity=0.5), law(tmp_path / "two.yaml", sparsity=0.5)
    config = load("provision", [*SMALL, "hours=1", f"laws=[{tmp_path / 'one.yaml'},{tmp_path / 'two.yaml'}]"])
    with pytest.raises(UserError, match="two laws of loss are of the same sparsity"):
        config.loss_laws()


def test_a_list_is_thinned_with_both_ends() -> None:
    places = [(index, 0, 0, 0, 0) for index in range(50)]
    assert thinned(places, 60) == places
    kept = thinned(places, 12)
    assert len(set(kept)) == 12
    assert (kept[0], kept[-1]) == (places[0], places[-1])
    assert thinned(places, 1) == places[:1]
