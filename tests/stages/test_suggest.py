"""`sparsetrain suggest` and the hidden matrices that it counts, against real optimizers and the laws themselves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sparsetrain as st
from sparsetrain.cli import main
from sparsetrain.cli.resolve import load
from sparsetrain.cost.flops import training_flops_per_token
from sparsetrain.data import prepare_corpora
from sparsetrain.errors import UserError
from sparsetrain.parameterization import Parameterization, param_groups
from sparsetrain.runs.result import RunResult
from sparsetrain.scaling.critical import fit_critical_batch
from sparsetrain.scaling.law import Quantity
from sparsetrain.stages.config import PretrainConfig, model_config
from sparsetrain.stages.hidden import hidden_of_run, steps_of
from sparsetrain.stages.masks import mask_manager, sparsity_section
from sparsetrain.stages.plan import plan_of
from sparsetrain.stages.pretrain import budget_of
from sparsetrain.stages.stage import build_model
from sparsetrain.studies.suggest import suggestion

SMALL = ["data.tokenizer=bytes", "data.context=32", "model=tiny", "parameterization.base_width=16"]


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("scheme", ["sp", "mup", "supar", "completep", "supar_completep"])
@pytest.mark.parametrize("rule", ["coupled", "width", "width_density"])
def test_rates_of_hidden_matrices_are_those_of_the_optimizers_groups(scheme: str, rule: str, mlp: str) -> None:
    rules = Parameterization(scheme=scheme, base_width=16, base_layers=1, wd_rule=rule, alpha=0.75)
    model = {"d_model": 32, "n_layers": 2, "n_heads": 2, "mlp": mlp, "vocab_size": 50}
    config = PretrainConfig(model=model, parameterization=rules, sparsity=st.SparsityConfig(sparsity=0.75))
    built = build_model(config, 50, torch.device("cpu"))
    groups = param_groups(built, rules, config.optimizer.lr, config.optimizer.weight_decay)
    hidden = hidden_of_run(config)
    rates: dict[tuple[float, float], int] = {}
    for group in groups:
        if group["name"] in ("hidden", "output"):
            key = (group["lr"], group["weight_decay"])
            rates[key] = rates.get(key, 0) + sum(parameter.numel() for parameter in group["params"])
    assert hidden.nonzeros == sum(rates.values())
    assert hidden.weights == sum(
        layer.in_features * layer.out_features for layer in built.modules() if isinstance(layer, st.SparseLinear)
    )
    assert (hidden.lr, hidden.weight_decay) == pytest.approx(max(rates, key=lambda key: rates[key]))
    products = [lr * decay for lr, decay in rates]
    assert hidden.others == pytest.approx(max(products) / min(products))
    assert hidden.tau(100) == pytest.approx(st.timescale(hidden.lr, hidden.weight_decay, 100))


def config(notes: Path, *words: str) -> Any:
    return load("suggest", [*SMALL, f"data.path={notes}", *words])


@pytest.mark.parametrize(
    "more", ["sparsity=gmp", "sparsity=erk", "budget.phases=[{share: 0.5, density: 1.0}, {share: 0.5}]"]
)
def test_rates_are_those_of_the_density_at_the_start(more: str, notes: Path) -> None:
    """Of masks that evolve, and of layers with densities of their own."""
    words = [*SMALL, f"data.path={notes}", "sparsity.sparsity=0.75", "budget.tokens=100000", more]
    run = load("pretrain", words)
    model = model_config(run.model, 257)
    budget = budget_of(run, model, None)
    built = build_model(run, 257, torch.device("cpu"), sparsity_section(run, budget))
    mask_manager(run, built, budget)
    groups = param_groups(built, run.parameterization, run.optimizer.lr, run.optimizer.weight_decay)
    of = [group for group in groups if group["name"] in ("hidden", "output")]
    hidden = hidden_of_run(run)
    assert hidden.nonzeros == sum(parameter.numel() for group in of for parameter in group["params"])
    assert (hidden.lr, hidden.weight_decay) in [pytest.approx((each["lr"], each["weight_decay"])) for each in of]
    assert hidden_of_run(replace(run, budget=replace(run.budget, tokens=None, epochs=1.0))) == hidden


def test_continued_training_has_the_densities_of_its_start(sparse: RunResult) -> None:
    start = sparse.directory
    run = load("pretrain", [f"init_from={start}", f"data.path={sparse['config']['data']['path']}", "budget.steps=5"])
    assert run.sparsity.sparsity == 0.75
    hidden = hidden_of_run(run)
    unsaid = replace(run, sparsity=replace(run.sparsity, sparsity=0.0))
    assert hidden_of_run(unsaid) == plan_of(unsaid).runs[0].hidden == hidden
    assert (hidden.nonzeros, hidden.resizes) == (hidden.weights // 4, False)
    assert hidden_of_run(replace(run, init_from=None)) == hidden
    shutil.rmtree(start)
    with pytest.raises(UserError, match="no such run directory"):
        hidden_of_run(run)


@pytest.mark.parametrize(
    ("words", "peak"),
    [
        (["schedule.segments=[{shape: warmup, share: 0.1, to: 0.5}, {shape: linear, share: 0.9, to: 0.0}]"], 0.5),
        (
            [
                "schedule=constant",
                "optimizer.schedules.weight_decay=[{shape: warmup, share: 0.1, to: 0.1}, {shape: linear, to: 0.05}]",
            ],
            0.1,
        ),
    ],
)
def test_tau_is_that_of_the_largest_decay_that_the_schedules_give(words: list[str], peak: float, notes: Path) -> None:
    words = ["budget.tokens=200000", "sparsity=dense", *words]
    run = load("pretrain", [*SMALL, f"data.path={notes}", "budget.batch_size=4", *words])
    hidden = hidden_of_run(run)
    assert hidden.peak == pytest.approx(peak)
    assert hidden.tau(100) == pytest.approx(1 / (hidden.lr * hidden.weight_decay * peak * 100))
    found = suggestion(config(notes, *words))
    suggested = load("pretrain", [*SMALL, f"data.path={notes}", *words, *found.overrides])
    tau = hidden_of_run(suggested).tau(steps_of(suggested) or 0)
    assert tau == pytest.approx(value(found, "timescale tau").value, rel=1e-4)


def test_a_law_per_nonzero_is_not_for_masks_whose_density_changes(notes: Path, tmp_path: Path) -> None:
    file = own_laws(tmp_path)[0]
    gmp = ["budget.tokens=400000", "sparsity=gmp", "sparsity.sparsity=0.75"]
    with pytest.raises(UserError, match=r"sparsity\.evolution\.rule=gmp changes the number of nonzeros"):
        suggestion(config(notes, *gmp, f"laws={file}"))
    assert suggestion(config(notes, *gmp)).tokens_per_nonzero is None


def value(found: Any, name: str) -> Any:
    return next(each for each in found.values if each.name == name)


def test_steps_follow_from_the_settings_alone() -> None:
    model = {"d_model": 32, "n_layers": 1, "n_heads": 2}
    budget = PretrainConfig(model=model).budget
    for settings, steps in (({"tokens": 1000}, 1), ({"steps": 7}, 7), ({"flops": 1e9}, None)):
        run = PretrainConfig(model=model, budget=replace(budget, epochs=None, batch_size=8, **settings))
        assert steps_of(run) == steps or (steps is None and steps_of(run) > 1)
    assert steps_of(PretrainConfig(model=model)) is None


def test_published_laws_say_batch_and_weight_decay(notes: Path) -> None:
    found = suggestion(config(notes, "budget.tokens=200000", "optimizer.lr=0.01", "sparsity=dense"))
    batch, decay = value(found, "batch in tokens"), value(found, "weight decay")
    assert abs(batch.value - st.batch_opt(200_000)) <= 16
    steps = value(found, "steps").value
    assert steps == -(-200_000 // batch.value)
    # The pretrain that these overrides make has the timescale that the law wants.
    run = load("pretrain", [*SMALL, f"data.path={notes}", "sparsity=dense", *found.overrides])
    hidden = hidden_of_run(run)
    assert hidden.tau(steps_of(run)) == pytest.approx(st.tau_opt(200_000 / hidden.weights), rel=1e-4)
    assert decay.origin == "published"
    assert "is outside of the range of the fit, 20 to 1280" in value(found, "timescale tau").warnings[0]
    assert found.notes[0].startswith("The text is not prepared yet")


def test_with_its_text_a_batch_beyond_it_is_refused_and_repetition_is_said(notes: Path) -> None:
    prepare_corpora(config(notes).data, progress=False)
    found = suggestion(config(notes))  # one pass over the text
    assert list(found.notes) == []
    assert suggestion(config(notes, "budget.tokens=400000")).notes[0].startswith("The run reads the text ")
    with pytest.raises(UserError, match=r"the best batch, [0-9,]+ tokens, has more than the [0-9,]+ tokens of the t"):
        suggestion(config(notes, "budget.tokens=20000000000"))


def own_laws(place: Path, sparsity: float = 0.75) -> list[str]:
    x = np.array([1.0, 4.0, 16.0, 64.0])
    noise = np.exp(np.random.default_rng(0).normal(0.0, 0.02, 4))
    tau = replace(st.fit_power_law(x, 2.0 * x**-0.6 * noise), kind="tau", inputs=(Quantity("tokens_per_nonzero"),))
    batch = replace(st.fit_power_law(x * 1e5, 3.0 * (x * 1e5) ** 0.5 * noise), kind="batch")
    b = np.array([100.0, 200.0, 400.0, 800.0])
    critical = fit_critical_batch(b, 1e5 * (1 + b / 400.0))
    files = []
    for law in (tau, batch, critical):
        files.append(str(place / f"{law.kind}.yaml"))
        replace(law, sparsity=sparsity, source="own fit of a test").save(files[-1])
    return files


def test_own_laws_take_the_place_of_published_ones(notes: Path, tmp_path: Path) -> None:
    files = own_laws(tmp_path)
    run = config(notes, "budget.tokens=400000", f"laws=[{','.join(files)}]", "sparsity.sparsity=0.75")
    found = suggestion(run)
    tau, batch, decay = (value(found, name) for name in ("timescale tau", "batch in tokens", "weight decay"))
    law = st.Law.load(files[0])
    ratio = 400_000 / hidden_of_run(run).nonzeros
    assert (tau.value, tau.interval) == (pytest.approx(law(ratio)), pytest.approx(law.predict_interval(ratio)))
    assert tau.value * decay.interval[1] == pytest.approx(decay.value * tau.value**2 / tau.interval[0])
    # The best batch of 1,900 tokens is above the critical one of 400, which leaves 12 sequences of 32 tokens.
    assert (batch.value, batch.at_most) == (pytest.approx(400, abs=16), pytest.approx(400, rel=1e-3))
    assert "above the critical one" in batch.warnings[-1]
    assert batch.interval == st.Law.load(files[2]).interval(of="b_crit")
    assert {tau.origin, batch.origin, decay.origin} == {"fit"}
    other = suggestion(config(notes, "budget.tokens=400000", f"laws={files[0]}", "sparsity=dense"))
    assert value(other, "timescale tau").warnings[0].startswith("The law was fitted at a sparsity of 0.75, and the run")


def saved(place: Path, name: str, **values: Any) -> str:
    """Save a power law of B_opt, B_crit or tau; return its file."""
    law = st.fit_power_law([1.0, 10.0, 100.0], [1.0, 1.1, 1.0])
    law = replace(law, **{"sparsity": 0.0, "source": name, **values})
    law.save(place / f"{name}.yaml")
    return str(place / f"{name}.yaml")


def test_a_critical_batch_over_d_min_is_that_of_half_of_the_tokens(notes: Path, tmp_path: Path) -> None:
    """At B = B_crit a training reads 2 D_min tokens; the batch has the interval of what it was capped at."""
    power = {"coefficient": 2.0, "exponent": 0.5}
    best = saved(tmp_path, "best", kind="batch", parameters={"coefficient": 8000.0, "exponent": 0.01})
    critical = saved(tmp_path, "crit", kind="critical", parameters=power, inputs=(Quantity("d_min", "tokens"),))
    run = config(notes, "budget.tokens=2000000", "sparsity=dense", f"laws=[{best},{critical}]")
    batch = value(suggestion(run), "batch in tokens")
    assert (batch.value, batch.at_most) == (pytest.approx(2000, abs=16), pytest.approx(2000))
    assert batch.interval == st.Law.load(critical).predict_interval(1e6)
    assert batch.source == "crit"
    assert any("D_min = 1,000,000 tokens of the critical batch is outside" in line for line in batch.warnings)


def test_a_batch_is_whole_micro_batches_and_never_above_the_critical_one(notes: Path, tmp_path: Path) -> None:
    words = ["budget.tokens=200000", "budget.batch_size=6", "loop.micro_batch=6"]
    batch = value(suggestion(config(notes, *words)), "batch in tokens")
    assert isinstance(batch.value, int)
    context = config(notes).data.context
    assert batch.value % (6 * context) == 0
    b = np.array([100.0, 200.0, 400.0, 800.0])
    for critical in (2.9 * 6 * context, 0.5 * context):
        fit_critical_batch(b, 1e5 * (1 + b / critical)).save(tmp_path / "critical.yaml")
        found = value(suggestion(config(notes, *words, f"laws={tmp_path / 'critical.yaml'}")), "batch in tokens")
        smallest = 6 * context
        assert found.value == (2 * smallest if critical > smallest else smallest)
        said = "The smallest batch here has" in " ".join(found.warnings)
        assert said == (critical < smallest)


def test_laws_that_suggest_nothing_are_named(notes: Path, tmp_path: Path) -> None:
    words = ["budget.tokens=200000", "sparsity=dense"]
    other = saved(tmp_path, "other")
    found = suggestion(config(notes, *words, f"laws={other}"))
    assert f"{other} is a law of the kind power, which suggests nothing here." in found.notes
    foreign = saved(tmp_path, "foreign", kind="tau", inputs=(Quantity("steps"),))
    with pytest.raises(UserError, match=r"inputs\[0\].name=steps: a law of the kind tau takes one of tokens_per_param"):
        suggestion(config(notes, *words, f"laws={foreign}"))
    first, second = saved(tmp_path, "a", kind="tau"), saved(tmp_path, "b", kind="tau")
    with pytest.raises(UserError, match=r"a\.yaml and .*b\.yaml are both of the kind tau at the same sparsity; give"):
        suggestion(config(notes, *words, f"laws=[{first},{second}]"))


@pytest.mark.parametrize("kind", ["tau", "batch", "critical"])
@pytest.mark.parametrize("power", [(1e300, 99.0), (1e-300, -99.0)])
def test_values_of_laws_that_are_no_numbers_are_one_line(
    kind: str, power: tuple[float, float], notes: Path, tmp_path: Path
) -> None:
    file = saved(tmp_path, kind, kind=kind, parameters=dict(zip(("coefficient", "exponent"), power, strict=True)))
    with pytest.raises(UserError, match="which is no usable number") as raised:
        suggestion(config(notes, "budget.tokens=2000000", "sparsity=dense", f"laws={file}"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "words",
    [
        ["budget.steps=3000"],
        ["budget.flops=1e11"],
        ["budget.epochs=1"],
        ["budget.tokens=200000"],
        ["budget.tokens=200000", "budget.batch_size={start: 2, end: 8}", "budget.wd_rule=tau"],
        [],
    ],
)
def test_the_command_with_what_is_appended_is_accepted(words: list[str], notes: Path) -> None:
    prepare_corpora(config(notes).data, progress=False)
    found = suggestion(config(notes, *words))
    run = load("pretrain", [*SMALL, f"data.path={notes}", *words, *found.overrides])
    assert run.budget.length == "tokens"
    tau = hidden_of_run(run).tau(steps_of(run) or 0)
    assert tau == pytest.approx(value(found, "timescale tau").value, rel=1e-4)


def test_a_timescale_above_one_is_said_with_what_it_means(notes: Path) -> None:
    found = suggestion(config(notes, "budget.tokens=8000", "sparsity=dense"))
    tau = value(found, "timescale tau")
    assert tau.value > 1.0
    assert "the weight decay is effectively off" in tau.warnings[-1]


def test_flops_or_seconds_set_the_tokens(notes: Path) -> None:
    by_flops = suggestion(config(notes, "flops=1e11"))
    by_time = suggestion(config(notes, "seconds=10", "flops_per_second=1e10"))
    assert by_flops == by_time
    tokens = int(by_flops.overrides[0].removeprefix("budget.tokens="))
    run = load("pretrain", [*SMALL, f"data.path={notes}", "budget.flops=1e11"])
    model = model_config(run.model, 257)
    per_token = training_flops_per_token(model, 1.0 - run.sparsity.sparsity, run.data.context).total
    assert tokens == pytest.approx(1e11 / per_token, rel=0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seconds=10"], "seconds and flops_per_second belong together"),
        (["flops=1e9", "budget.tokens=5"], "flops and budget.tokens: give one length of the run"),
        (["flops=-1"], "flops=-1.0 must be above 0"),
        (["format=xml"], "format='xml' is not one of text, json"),
        (["per=layer"], "per='layer' is not one of"),
        (["laws=3"], "laws=3 must be a file of sparsetrain fit"),
        (["laws=none.yaml"], "cannot read none.yaml"),
        (["budget.phases=[{share: 1.0}]"], "budget.phases: suggest is for a run of one phase"),
        (["optimizer=sgd", "parameterization.optimizer=sgd"], "optimizer.name=sgd: the laws are about AdamW"),
        (["budget.tokens=100"], "the best batch, .* tokens, has more than the 100 tokens of the run"),
        (["budget.tokens=5000", "schedule.warmup_steps=500"], "warmup"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, notes: Path) -> None:
    with pytest.raises(UserError, match=message) as raised:
        suggestion(config(notes, *words))
    assert "\n" not in str(raised.value)


def test_json_is_alone_on_standard_output(
    notes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SMALL, f"data.path={notes}", "budget.tokens=200000"]
    assert main(["suggest", *words, "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["name"] for each in found["values"]} >= {"learning rate", "weight decay", "batch in tokens", "steps"}
    assert main(["suggest", *words]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1].split() == found["overrides"]
