"""Fits the constants of the GPUs on the published steps of the rule, and predicts all others.

    python experiments/simulator_published/fit.py            # fits; writes machine files, results.csv, figure
    python experiments/simulator_published/fit.py --predict  # predicts with the machine files as they are

The rule is in README.md. A constant that the rows do not determine keeps its prior and is written as assumed.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.optimize import least_squares

from sparsetrain.cost.cluster.memory import cluster_memory
from sparsetrain.cost.cluster.published import Row, published_rows
from sparsetrain.cost.hardware import Machine

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
IN_FILE = {
    "product": "efficiency.linear",
    "attention": "efficiency.attention",
    "memory": "efficiency.default",
    "inner": "links[0].efficiency",
    "outer": "links[1].efficiency",
    "overlap": "overlap",
    "launch": "launch",
}


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
        return {"kind": kinds[name], "source": "fit" if kinds[name] == "measured" else "prior"}

    tables = curves(constants)
    file = dict(base)
    file["sources"] = {name: source for name, source in base["sources"].items() if name not in ("fit", "prior")} | {
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
    used = {entry for _, entry in _sources(file)}
    file["sources"] = {name: source for name, source in file["sources"].items() if name in used}
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
    """Write a machine's file."""
    path.write_text(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=118), "utf-8")


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


def load(name: str) -> Machine:
    """Return a machine that rows name."""
    own = HERE / f"{name}.yaml"
    return Machine.load(own if own.exists() else name)


def predictions(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what the machine files say of every row."""
    machines = {name: load(name) for name in dict.fromkeys(row.machine for row in rows)}
    found = []
    for row in rows:
        terms = row.terms(machines[row.machine])
        line: dict[str, Any] = {"table": row.table, "row": row.number, "model": row.model, "machine": row.machine}
        line |= {"fitted": "yes" if row.fitted else "no", "seconds": f"{row.seconds:.6g}"}
        line |= {
            "predicted": f"{float(terms.total):.6g}",
            "error_pct": f"{100 * (float(terms.total) / row.seconds - 1):.2f}",
        }
        line |= {name: f"{float(value):.4g}" for name, value in terms.as_dict().items()}
        if row.memory is not None:
            memory = float(row.predicted_memory().total)
            line |= {"memory_gib": f"{row.memory / 2**30:.2f}", "predicted_gib": f"{memory / 2**30:.2f}"}
            line |= {"memory_error_pct": f"{100 * (memory / row.memory - 1):.2f}"}
        found.append(line)
    return found


def summary(lines: Sequence[dict[str, Any]]) -> str:
    """Return one line for the fitted and one for the withheld rows of every table."""
    text = ["| table | rows | fitted | mean error | bias | worst |", "|---|---|---|---|---|---|"]

    def add(name: str, fitted: str, chosen: Sequence[dict[str, Any]], column: str = "error_pct") -> None:
        errors = np.asarray([float(line[column]) for line in chosen])
        worst = errors[np.argmax(np.abs(errors))]
        text.append(
            f"| {name} | {len(errors)} | {fitted} | {np.abs(errors).mean():.1f} % | {errors.mean():+.1f} % | {worst:+.1f} % |"
        )

    for table in dict.fromkeys(line["table"] for line in lines):
        for fitted in ("yes", "no"):
            chosen = [line for line in lines if line["table"] == table and line["fitted"] == fitted]
            if chosen:
                add(table, fitted, chosen)
    bar = [line for line in lines if line["table"] in ("simumax_b200", "korthikanti_a100")]
    add("**bar: simumax_b200 and korthikanti_a100**", "both", bar)
    add("memory, simumax_b200", "no", [line for line in lines if "memory_error_pct" in line], "memory_error_pct")
    return "\n".join(text)


def figure(lines: Sequence[dict[str, Any]]) -> None:
    """Draw predicted over measured time."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    tables = list(dict.fromkeys(line["table"] for line in lines))
    drawing, axes = pyplot.subplots(figsize=(8.0, 4.2), layout="constrained")
    for place, table in enumerate(tables):
        for fitted, color, shift in (("yes", "tab:gray", -0.12), ("no", "tab:blue", 0.12)):
            ratios = [
                1.0 + float(each["error_pct"]) / 100
                for each in lines
                if (each["table"], each["fitted"]) == (table, fitted)
            ]
            label = {"yes": "fitted", "no": "withheld"}[fitted] if place in (0,) else None
            axes.scatter(np.full(len(ratios), place + shift), ratios, s=12, alpha=0.6, color=color, label=label)
    axes.axhspan(0.95, 1.05, color="tab:green", alpha=0.12, label="within 5 %")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(tables)), [table.replace("_", "\n", 1) for table in tables], fontsize=8)
    axes.set_ylabel("predicted / measured seconds of a step")
    axes.legend(fontsize=8)
    drawing.savefig(HERE / "figure.png", dpi=150)


def main(arguments: Sequence[str]) -> None:
    rows = published_rows()
    if "--predict" not in arguments:
        for name in ("b200", "a100", "h100"):
            path = MACHINES / f"{name}.yaml"
            base = yaml.safe_load(path.read_text("utf-8"))
            chosen = [row for row in rows if row.machine == name and row.fitted]
            print(f"{name}: {len(chosen)} rows of {chosen[0].table}")
            title = f"experiments/simulator_published/fit.py, {len(chosen)} rows of: {chosen[0].title}"
            constants, kinds = fit(base, name, chosen)
            write(path, document(base, constants, kinds, title))
        smaller_a100()
    lines = predictions(rows)
    columns = list(dict.fromkeys(column for line in lines for column in line))
    with (HERE / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    figure(lines)
    print(summary(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
