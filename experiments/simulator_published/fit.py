"""Fits the constants of machines on the published steps of the rule.

    python experiments/simulator_published/fit.py  # writes the machine files, in about a minute

predict.py then predicts every row. The rule is in README.md. A constant that the rows do not determine keeps its prior
and is written as assumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.optimize import brentq, least_squares

from sparsetrain.cost.cluster.published import FOLDER, Row, published_rows
from sparsetrain.cost.hardware import Machine
from sparsetrain.reading import read_csv

HERE = Path(__file__).parent
MACHINES = HERE.parents[1] / "sparsetrain" / "cost" / "machines"
DATE = "2026-11-30"
NOISE = 0.03  # of the logarithm of a published time

WIDTHS = [2.0**power for power in range(8, 16)]
TOKENS = [2.0**power for power in range(10, 19)]
CONTEXTS = [2.0**power for power in range(9, 18)]


@dataclass(frozen=True)
class Prior:
    """A constant: its likely value, the standard deviation of its logarithm, and the most that it can be."""

    name: str
    value: float
    spread: float
    most: float = np.inf


PRIORS = [
    Prior("product", 0.75, 0.15, 1.0),  # largest efficiency of a product
    Prior("product_width", 256.0, 1.0),  # width at which half of it is reached
    Prior("product_tokens", 256.0, 1.0),  # tokens at which half of it is reached
    Prior("attention", 0.6, 0.7),  # of the FLOPs of all pairs; above 1 if masked pairs are skipped
    Prior("attention_context", 500.0, 1.0),  # context at which half of it is reached
    Prior("attention_narrow", 0.8, 0.3),  # factor of heads of width 64 to those of 128
    Prior("memory", 0.7, 0.3, 1.0),  # share of the bandwidth
    Prior("inner", 0.75, 0.25, 1.0),  # share of the link in a node
    Prior("outer", 0.75, 0.25, 1.0),  # share of the link between nodes
    Prior("overlap", 0.8, 0.3, 1.0),  # share of reductions that computation hides
    Prior("launch", 2e-6, 0.7),  # seconds between two operations
]
NAMES = [prior.name for prior in PRIORS]
OWN = ("fit", "prior", "withheld", "pairs")  # sources that this program writes
ASSUMED = ("narayanan_a100", "megatron_h100")  # tables that do not publish all of a step's division


def curves(constants: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Return the tables of a machine's file."""
    width = np.asarray(WIDTHS) / (np.asarray(WIDTHS) + constants["product_width"])
    tokens = np.asarray(TOKENS) / (np.asarray(TOKENS) + constants["product_tokens"])
    context = np.asarray(CONTEXTS) / (np.asarray(CONTEXTS) + constants["attention_context"])
    heads = np.asarray([constants["attention_narrow"], 1.0])
    return {
        "linear": {
            "axes": {"width": WIDTHS, "tokens": TOKENS},
            "values": constants["product"] * width[:, None] * tokens[None, :],
        },
        "attention": {
            "axes": {"context": CONTEXTS, "d_head": [64.0, 128.0]},
            "values": constants["attention"] * context[:, None] * heads[None, :],
        },
        "default": {"values": np.asarray(constants["memory"])},
    }


def document(base: dict[str, Any], constants: dict[str, float], kinds: dict[str, str], title: str) -> dict[str, Any]:
    """Return a machine's file with other constants."""

    def rounded(value: Any) -> Any:
        return np.vectorize(lambda each: float(f"{each:.4g}"))(value).tolist()

    def by(name: str) -> dict[str, str]:
        measured = any(kinds[each] == "measured" for each in kinds if each == name or each.startswith(f"{name}_"))
        return {"kind": "measured" if measured else "assumed", "source": "fit" if measured else "prior"}

    tables = curves(constants)
    file = {key: value for key, value in base.items() if key != "spread"}
    file["sources"] = {name: source for name, source in base["sources"].items() if name not in OWN} | {
        "fit": {"title": title, "date": DATE},
        "prior": {"title": f"assumed: the prior of the fit, which its rows leave where it was ({title})", "date": DATE},
    }
    file["efficiency"] = {
        name: {**({"axes": table["axes"]} if "axes" in table else {}), "values": rounded(table["values"]), **by(key)}
        for (name, table), key in zip(tables.items(), ("product", "attention", "memory"), strict=True)
    }
    file["launch"] = {"value": f"{constants['launch'] * 1e6:.3g} us", **by("launch")}
    file["links"] = [
        {**link, "efficiency": {"value": rounded(constants[name]), **by(name)}}
        for link, name in zip(base["links"], ("inner", "outer"), strict=True)
    ]
    file["overlap"] = {"value": rounded(constants["overlap"]), **by("overlap")}
    return file


def _sources(value: Any) -> Iterable[tuple[str, str]]:
    if isinstance(value, dict):
        for key, each in value.items():
            if key == "source":
                yield key, each
            yield from _sources(each)
    elif isinstance(value, list):
        for each in value:
            yield from _sources(each)


def fit(base: dict[str, Any], name: str, rows: Sequence[Row]) -> tuple[dict[str, float], dict[str, str]]:
    """Return the constants of a machine, and whether the rows determine each: ``measured`` or ``assumed``."""
    spreads = np.asarray([prior.spread for prior in PRIORS])
    likely = np.log([prior.value for prior in PRIORS])
    most = np.log([prior.most for prior in PRIORS])
    kinds = dict.fromkeys(NAMES, "measured")

    def residuals(point: NDArray[np.float64]) -> NDArray[np.float64]:
        constants = dict(zip(NAMES, np.exp(point), strict=True))
        machine = Machine.from_document(document(base, constants, kinds, "fit"), name, "fit")
        return np.asarray([np.log(float(row.terms(machine).total) / row.seconds) for row in rows]) / NOISE

    def objective(point: NDArray[np.float64]) -> NDArray[np.float64]:
        off = residuals(point)
        robust = np.sign(off) * np.sqrt(2.0 * (np.sqrt(1.0 + off**2) - 1.0))  # an outlier counts linearly
        return np.concatenate([robust, (point - likely) / spreads])

    found = least_squares(objective, likely, bounds=(likely - 8.0 * spreads, most), x_scale=spreads, diff_step=1e-3)
    deviation = np.sqrt(np.diag(np.linalg.inv(found.jac.T @ found.jac)))
    kinds = {
        key: "measured" if own < 0.7 * prior else "assumed"
        for key, own, prior in zip(NAMES, deviation, spreads, strict=True)
    }
    constants = dict(zip(NAMES, (float(value) for value in np.exp(found.x)), strict=True))
    for key, own in zip(NAMES, deviation, strict=True):
        print(f"  {key:18s} {constants[key]:10.4g}  +- {100 * own:5.1f} %  {kinds[key]}")
    return constants, kinds


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a machine's file without the sources that nothing in it names."""
    used = {entry for _, entry in _sources(content)}
    content["sources"] = {name: source for name, source in content["sources"].items() if name in used}
    path.write_text(
        yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=118, default_flow_style=None),
        "utf-8",
    )


def smaller_a100() -> None:
    """Write the A100 with 40 GB: the file of the A100 with the memory of the smaller one."""
    content = yaml.safe_load((MACHINES / "a100.yaml").read_text("utf-8"))
    content["label"] = "NVIDIA A100 SXM 40 GB"
    source = (
        "NVIDIA A100 40 GB data sheet, as transcribed in S. Bekman, Machine Learning Engineering, compute/accelerator"
    )
    content["sources"]["smaller"] = {"title": source, "date": "2020"}
    level = {key: {"kind": "datasheet", "source": "smaller"} for key in ("size", "bandwidth")}
    level["size"]["value"], level["bandwidth"]["value"] = "40 GB", "1.555 TB/s"
    content["memory"][-1] = {"name": "hbm2", **level}
    write(HERE / "a100_40gb.yaml", content)


def streamed(name: str, rows: Sequence[Row]) -> None:
    """Fit the efficiency of a machine whose weights are streamed on its one fitted row, and write its file."""
    path = MACHINES / f"{name}.yaml"
    base = yaml.safe_load(path.read_text("utf-8"))
    (row,) = (row for row in rows if row.fitted)

    def file(value: float) -> dict[str, Any]:
        curve = {"values": float(f"{value:.4g}"), "kind": "measured", "source": "fit"}
        title = f"experiments/simulator_published/fit.py, {row.model} of: {row.title}"
        return {
            **base,
            "sources": base["sources"] | {"fit": {"title": title, "date": DATE}},
            "efficiency": base["efficiency"] | {"linear": curve, "attention": curve},
        }

    def off(value: float) -> float:
        return float(row.terms(Machine.from_document(file(value), name, name)).total) / row.seconds - 1.0

    best = brentq(off, 0.01, 1.0)
    print(f"{name}: products and attention {best:.4g}")
    write(path, with_spread(file(best), name, rows))


def with_spread(content: dict[str, Any], name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Return a machine's file with the spread of its withheld rows in tables that publish all that they need."""
    machine = Machine.from_document(content, name, name)
    chosen = [row for row in rows if not row.fitted and row.table not in ASSUMED]
    off = np.log([row.seconds / float(row.terms(machine).total) for row in chosen])
    spread = float(np.sqrt(np.mean(off**2)))
    title = f"experiments/simulator_published/fit.py: root mean square over {len(chosen)} withheld steps"
    print(f"{name}: spread {spread:.3f} over {len(chosen)} withheld rows")
    return {
        **content,
        "sources": content["sources"] | {"withheld": {"title": title, "date": DATE}},
        "spread": {"value": float(f"{spread:.3g}"), "kind": "measured", "source": "withheld"},
    }


def with_pairs(content: dict[str, Any]) -> dict[str, Any]:
    """Return a GPU's file with the efficiency of 2:4 products, fitted on the larger of two published layers.

    The published speed-up counts both passes; a product has half the FLOPs, so its efficiency is half the speed-up.
    """
    (point,) = (each for each in read_csv(FOLDER / "speedups.csv") if each["fitted"] == "yes")
    factor = 0.5 * float(point["low"])
    dense = content["efficiency"]["linear"]
    values = np.vectorize(lambda each: float(f"{each:.4g}"))(factor * np.asarray(dense["values"])).tolist()
    here = content["label"].startswith("NVIDIA A100")
    kind = "measured" if here else "assumed"
    pairs = {"axes": dense["axes"], "values": values, "kind": kind, "source": "pairs"}
    where = "" if here else "assumed: as on an A100: "
    title = f"{where}{point['source']}; {point['low']} times as fast with 2:4 weights over both passes"
    return {
        **content,
        "sources": content["sources"] | {"pairs": {"title": title, "date": point["date"]}},
        "efficiency": content["efficiency"] | {"linear.2:4": pairs},
    }


def like_h100(content: dict[str, Any]) -> None:
    """Write the H200 with the constants of the H100, whose arithmetic it has; no published step was found for it."""
    path = MACHINES / "h200.yaml"
    base = yaml.safe_load(path.read_text("utf-8"))
    title = "assumed: as for the H100, which has the same arithmetic and links; no step of an H200 was fitted"
    source = {"kind": "assumed", "source": "h100"}
    base["efficiency"] = {name: {**curve, **source} for name, curve in content["efficiency"].items()}
    base["launch"], base["overlap"] = {**content["launch"], **source}, {**content["overlap"], **source}
    base["links"] = [
        {**own, "efficiency": {**theirs["efficiency"], **source}}
        for own, theirs in zip(base["links"], content["links"], strict=True)
    ]
    base["spread"] = {**content["spread"], **source}
    base["sources"]["h100"] = {"title": title, "date": DATE}
    write(path, base)


def main() -> None:
    rows = published_rows()
    for name in ("b200", "a100", "h100"):
        path = MACHINES / f"{name}.yaml"
        base = yaml.safe_load(path.read_text("utf-8"))
        own = [row for row in rows if row.machine == name]
        chosen = [row for row in own if row.fitted]
        print(f"{name}: {len(chosen)} rows of {chosen[0].table}")
        title = f"experiments/simulator_published/fit.py, {len(chosen)} rows of: {chosen[0].title}"
        constants, kinds = fit(base, name, chosen)
        content = with_pairs(with_spread(document(base, constants, kinds, title), name, own))
        write(path, content)
        if name == "h100":
            like_h100(content)
    smaller_a100()
    for name in ("cs2", "cs3"):
        streamed(name, [row for row in rows if row.machine == name])


if __name__ == "__main__":
    main()
