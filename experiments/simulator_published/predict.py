"""Predicts every published step and speed-up with the machine files as they are.

    python experiments/simulator_published/predict.py  # writes results.csv, speedups.csv and the figure

The constants come from fit.py.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsetrain.cost.cluster.parallelism import Parallelism
from sparsetrain.cost.cluster.published import FOLDER, Row, published_rows
from sparsetrain.cost.cluster.schedule import cluster_terms
from sparsetrain.cost.hardware import Machine
from sparsetrain.cost.operations import PRODUCTS, step_operations
from sparsetrain.cost.sizes import Layers, Sizes
from sparsetrain.cost.timing import Setting, operation_terms
from sparsetrain.reading import read_csv

HERE = Path(__file__).parent
BAND = 1.645  # standard deviations of a band of 90 %
FEW = 3  # tables of fewer rows have no dots of their own in the figure


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
        mean, bias = np.abs(errors).mean(), errors.mean()
        text.append(f"| {name} | {len(errors)} | {fitted} | {mean:.1f} % | {bias:+.1f} % | {worst:+.1f} % |")

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

    every = [line["table"] for line in lines]
    tables = [table for table in dict.fromkeys(every) if every.count(table) >= FEW]
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


LLAMA = Sizes(4096.0, 32.0, 32.0, 4096.0, 11008.0, 32000.0, gated=True, tied=False, layernorm=False, rotated=128.0)
MATRICES = ("attn.qkv", "attn.out", "mlp.gate", "mlp.up", "mlp.down")
CORES = 64  # of the CPU that a sparse product is compared with


def sparse_layers(sparsity: float) -> list[Layers]:
    """Return the blocks of Llama 2 7B with one sparsity of every matrix."""
    return [Layers(LLAMA.layers, dict.fromkeys(MATRICES, 1.0 - sparsity))]


def flop_ratio(sparsity: float) -> float:
    """Return dense over sparse FLOPs of matrix products in a step of Llama 2 7B."""
    totals = [
        sum(
            float(each.count * each.flops)
            for each in step_operations(LLAMA, 4096.0, 1.0, layers)
            if each.kind in PRODUCTS
        )
        for layers in (None, sparse_layers(sparsity))
    ]
    return totals[0] / totals[1]


def step_speedup(machine: Machine, sparsity: float) -> float:
    """Return dense over sparse seconds of a step of Llama 2 7B, 1024 sequences of 4096 tokens."""
    sparse = sparse_layers(sparsity)
    times = [
        float(
            cluster_terms(
                LLAMA, 4096.0, 1024.0, machine, Parallelism(micro_batch=64.0), Setting("bfloat16"), layers
            ).total
        )
        for layers in (None, sparse)
    ]
    return times[0] / times[1]


def product_seconds(
    machine: Machine, width: tuple[float, float], tokens: float, density: float, setting: Setting, kinds: Sequence[str]
) -> float:
    """Return the seconds of products with one matrix, by the model's MLP."""
    rows, columns = width
    sizes = Sizes(columns, 1.0, 1.0, columns, rows, 1.0)
    found = step_operations(sizes, tokens, 1.0, [Layers(1.0, {"mlp.up": density})], value_bytes=2.0)
    chosen = [each for each in found if each.module == "blocks.*.mlp.up" and each.phase in kinds]
    return sum(float(sum(operation_terms(each, machine, setting).values())) for each in chosen)


def speedups() -> list[dict[str, str]]:
    """Return the published sparse speed-ups with the predicted ones."""
    lines = []
    for point in read_csv(FOLDER / "speedups.csv"):
        machine, sparsity, theory = load(point["machine"]), float(point["sparsity"]), ""
        if point["what"].startswith("2:4"):
            sides = (4096.0, 1024.0) if point["point"].endswith("up") else (1024.0, 4096.0)
            setting, both = Setting("float16", two_of_four=True), ("forward", "backward")
            dense, sparse = (product_seconds(machine, sides, 13008.0, each, setting, both) for each in (1.0, 0.5))
            value = dense / sparse
        elif point["what"].startswith("training"):
            value, theory = step_speedup(machine, sparsity), f"{flop_ratio(sparsity):.4g}"
        else:  # a matrix of 16384 x 16384 and as many columns, on the machine and on all cores of a CPU
            sides, once = (16384.0, 16384.0), ("forward",)
            here = product_seconds(machine, sides, 16384.0, 1.0 - sparsity, Setting("bfloat16"), once)
            there = product_seconds(load(point["baseline"]), sides, 16384.0, 1.0 - sparsity, Setting("float32"), once)
            value = there / CORES / here
        spread = 0.0 if machine.spread is None else machine.spread.value
        band = " to ".join(f"{value * np.exp(side * BAND * spread):.3g}" for side in (-1.0, 1.0))
        lines.append({**point, "predicted": f"{value:.4g}", "band": band, "theory": theory})
    return lines


def write(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write a table."""
    columns = list(dict.fromkeys(column for line in lines for column in line))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def main() -> None:
    lines = predictions(published_rows())
    write(HERE / "results.csv", lines)
    figure(lines)
    print(summary(lines))
    points = speedups()
    write(HERE / "speedups.csv", points)
    for point in points:
        print(point["point"], point["low"], point["high"], "predicted", point["predicted"])


if __name__ == "__main__":
    main()
