"""Rows of tables of arms, each from the directory of one finished run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from sparsetrain.cost.flops import hidden_shapes, training_flops_per_token
from sparsetrain.models.config import ModelConfig
from sparsetrain.report import arms as tables
from sparsetrain.report.arms import MASK_COLUMNS, MOMENTS, PRETRAIN, STAGE_COLUMNS, TOKENS, Arms, Course, Row
from sparsetrain.report.measured import KINDS, of_result
from sparsetrain.report.run_files import COLUMNS, moments_of
from sparsetrain.report.times import cells
from sparsetrain.runs.layout import CONFIG, METRICS, RESULT
from sparsetrain.runs.metrics import read_metrics
from sparsetrain.runs.recorded import read_recorded
from sparsetrain.settings import build
from sparsetrain.shapes import Positive, check
from sparsetrain.sparsity.evolution.base import RULES
from sparsetrain.stages.config import RunConfig


class _Data(TypedDict):
    context: Positive


class _PretrainConfig(TypedDict):
    data: _Data


class _Evolution(TypedDict):
    rule: str


class _Sparsity(TypedDict):
    evolution: _Evolution


class _MaskConfig(TypedDict):
    sparsity: _Sparsity


def absolute(directory: Path) -> Path:
    return Path(os.path.abspath(directory))


def stage_name(directory: Path, result: Row) -> str:
    """Return the name of a stage: that of its directory, without the prefix of its task."""
    return absolute(directory).name.removeprefix(f"{result.get('task')}-")


def stage_table(directory: Path, result: Row) -> Arms:
    """Return the table of one stage of a pipeline.

    Raises:
        UserError: the result or the configuration lacks what a row needs.
    """
    where = str(directory / RESULT)
    name, is_pretraining = stage_name(directory, result), result.get("stage") == PRETRAIN
    low, high = result.get("ci95") or (None, None)
    scores = {**_scores(result), **_chosen_by(result)}
    row = _row(
        result,
        STAGE_COLUMNS,
        arm=absolute(directory).parent.name.removeprefix(f"{result.get('task')}-"),
        stage=name,
        task=result.get("task"),
        ci_low=low,
        ci_high=high,
        flop_ratio_formula=_formula(directory, result) if is_pretraining or name == PRETRAIN else None,
        **_hidden(directory, result),
        **scores,
    )
    columns = (*COLUMNS, *STAGE_COLUMNS, *scores, *cells(result))
    tables.check_row(row, tables.StageRow, tables.score_columns(columns), where)
    run = (row["arm"], name, row["seed"])
    measured = {kind.name: of_result(kind, result, run, where) for kind in KINDS if result.get(kind.name)}
    return Arms([row], columns, str(directory), measured=measured)


def mask_table(directory: Path, result: Row) -> Arms:
    """Return the table of one run whose masks evolve.

    Raises:
        UserError: the result or the configuration lacks what a row needs.
    """
    config = check(read_recorded(directory, RunConfig).values, _MaskConfig, str(directory / CONFIG))
    masks = result.get("masks") or {}
    row = _row(
        result,
        MASK_COLUMNS,
        rule=_rule(config),
        itop_rate=masks.get("itop_rate"),
        mask_overlap=masks.get("mask_overlap"),
        dead_rows=int(sum(layer.get("dead_rows") or 0 for layer in masks.get("layers", {}).values())),
    )
    check(row, tables.MaskRow, str(directory / RESULT))
    course = {(row["rule"], row["seed"]): _course(directory, row)} if (directory / METRICS).exists() else {}
    return Arms([row], (*COLUMNS, *MASK_COLUMNS, *cells(result)), str(directory), course)


def _row(result: Row, columns: Sequence[str], **known: Any) -> Row:
    """Return the columns that tables of stages and tables of masks have in common."""
    row = {name: result.get(name) for name in (*COLUMNS, *columns)}
    return (
        row
        | {"loss": result.get("loss_last"), "flops": (result.get("flops") or {}).get("total")}
        | cells(result)
        | known
    )


def _scores(result: Row) -> Row:
    """Return the columns about several corpora, and about what an adaptation began with."""
    moments, found = moments_of(result), Row()
    for name, score in moments["after"].items():
        found[f"loss_{name}"] = score.get("val_loss", score.get("loss"))
        found[f"bits_per_byte_{name}"] = score.get("bits_per_byte")
    for moment in MOMENTS:
        for name, score in moments[moment].items():
            found[f"bits_per_byte_{moment}_{name}"] = score.get("bits_per_byte")
    adapted = result.get("adaptation") or {}
    for name, entry in (adapted.get("corpora") or {}).items():
        for key in TOKENS:
            if key in entry:
                found |= {f"{key}_before_{name}": entry[key]["old"], f"{key}_{name}": entry[key]["new"]}
    forgetting = adapted.get("forgetting")
    return found if forgetting is None else {**found, "forgetting": forgetting}


def _chosen_by(result: Row) -> Row:
    """Return the columns that some stages have: what settings are chosen by, and what a fair comparison needs."""
    known = {
        "reported_bits_per_byte": result.get("reported_bits_per_byte"),
        "validation_accuracy": result.get("validation_accuracy"),
        "bag_of_words": (result.get("bag_of_words") or {}).get("accuracy"),
    }
    return {name: value for name, value in known.items() if value is not None}


def _hidden(directory: Path, result: Row) -> Row:
    """Return the columns about the hidden matrices, and the tokens that trained each weight, as far as they are known.

    The nonzeros are those at the end, which are those of the whole run unless its rule changes their number.
    """
    if not result.get("model"):
        return {}
    weights = sum(height * width for height, width in hidden_shapes(_model(directory, result)).values())
    resizing = {rule.__name__ for _, rule in RULES.things() if rule.resizes}
    known = result.get("density") is not None and (result.get("masks") or {}).get("rule") not in resizing
    nonzeros = round(weights * result["density"]) if known else None
    tokens = result.get("tokens") if result.get("steps") else None  # an evaluation trains nothing
    return {
        "weights": weights,
        "nonzeros": nonzeros,
        "tokens_per_weight": tokens / weights if tokens else None,
        "tokens_per_nonzero": tokens / nonzeros if tokens and nonzeros else None,
    }


def _model(directory: Path, result: Row) -> ModelConfig:
    settings = {key: value for key, value in result["model"].items() if key != "sparsity"}
    return build(ModelConfig, settings, f"{directory / RESULT}: model.")


def _formula(directory: Path, result: Row) -> float | None:
    """Return F(0) / F(s), the FLOPs of the dense over those of the sparse model, by formula from the sparsity s."""
    if not result.get("model") or result.get("sparsity") is None:
        return None
    model = _model(directory, result)
    config = check(read_recorded(directory, RunConfig).values, _PretrainConfig, str(directory / CONFIG))
    dense, sparse = (
        training_flops_per_token(model, 1.0 - s, config["data"]["context"]).total for s in (0.0, result["sparsity"])
    )
    return dense / sparse


def _rule(config: Row) -> str:
    """Return the rule of evolution, or ``vspdf`` if the phases of the budget set densities."""
    phases = (config.get("budget") or {}).get("phases") or []
    changes = any(phase.get("density") is not None for phase in phases)
    return "vspdf" if changes else str(config["sparsity"]["evolution"]["rule"])


def _course(directory: Path, row: Row) -> Course:
    records = read_metrics(directory / METRICS) if row["steps"] else []
    return [
        (record["step"] / row["steps"], record["density"], record["itop_rate"])
        for record in records
        if record.get("itop_rate") is not None and record.get("density") is not None
    ]
