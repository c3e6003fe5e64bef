"""Training steps that others measured and published, and what the model says of them.

``cost/published`` has them as facts with their sources: ``rows.csv`` one step a row, ``tables.yaml`` the models, and
what holds for all rows of a table. Times that were published as a rate are converted by the formula of the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from sparsetrain.cost.cluster.memory import ClusterMemory, cluster_memory
from sparsetrain.cost.cluster.parallelism import Parallelism
from sparsetrain.cost.cluster.schedule import cluster_terms
from sparsetrain.cost.hardware import Machine
from sparsetrain.cost.sizes import Sizes
from sparsetrain.cost.timing import Setting, Terms
from sparsetrain.reading import read_csv, read_yaml

FOLDER = Path(__file__).parents[1] / "published"


class _Model(TypedDict):
    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    gated: bool
    biased: bool
    tied: bool
    layernorm: bool
    rotary: bool
    learned: bool


class _Table(TypedDict):
    machine: str
    title: str
    date: str
    dtype: str
    attention: str
    overlap: bool
    reduce_bytes: float
    fused_loss: bool


class _Tables(TypedDict):
    models: dict[str, _Model]
    tables: dict[str, _Table]


@dataclass(frozen=True)
class Row:
    """One published step.

    Args:
        table: the table's name. number: its place there. model: the model's name.
        machine: the machine's name. title: the source. date: of the source.
        sizes: the model. context: T. global_batch: sequences of a step.
        parallelism: how it was divided. setting: how it was computed.
        seconds: of the step, measured. memory: bytes of the fullest device, measured, or None.
        fitted: whether constants of the machine were fitted on this row.
        fused_loss: whether logits are turned into their gradient in place.
    """

    table: str
    number: int
    model: str
    machine: str
    title: str
    date: str
    sizes: Sizes
    context: float
    global_batch: float
    parallelism: Parallelism
    setting: Setting
    seconds: float
    memory: float | None
    fitted: bool
    fused_loss: bool

    def terms(self, machine: Machine) -> Terms:
        """Return the predicted seconds by term."""
        return cluster_terms(self.sizes, self.context, self.global_batch, machine, self.parallelism, self.setting)

    def predicted_memory(self) -> ClusterMemory:
        """Return the predicted bytes of the fullest device by component."""
        return cluster_memory(
            self.sizes,
            self.context,
            self.global_batch,
            self.parallelism,
            self.setting,
            fused_loss=self.fused_loss,
            placeholders=self.fused_loss,
        )


def published_rows() -> list[Row]:
    """Return all published steps, in the order of their tables."""
    tables = read_yaml(FOLDER / "tables.yaml", _Tables)
    return [_row(cells, tables) for cells in read_csv(FOLDER / "rows.csv")]


def _row(cells: Mapping[str, str], tables: _Tables) -> Row:
    table, model = tables["tables"][cells["table"]], tables["models"][cells["model"]]
    context = float(cells["context"])
    division = {name: float(cells[name]) for name in ("data", "tensor", "pipeline", "interleave", "micro_batch")}
    return Row(
        table=cells["table"],
        number=int(cells["row"]),
        model=cells["model"],
        machine=table["machine"],
        title=table["title"],
        date=table["date"],
        sizes=Sizes(
            width=float(model["width"]),
            layers=float(model["layers"]),
            heads=float(model["heads"]),
            kv_width=float(model["width"] / model["heads"] * model["kv_heads"]),
            ffn=float(model["ffn"]),
            vocabulary=float(model["vocabulary"]),
            gated=model["gated"],
            biased=model["biased"],
            tied=model["tied"],
            layernorm=model["layernorm"],
            rotated=float(model["width"] / model["heads"]) if model["rotary"] else 0.0,
            positions=context if model["learned"] else 0.0,
        ),
        context=context,
        global_batch=float(cells["global_batch"]),
        parallelism=Parallelism(
            **division,
            sequence=cells["sequence"] == "yes",
            zero=int(cells["zero"]),
            recompute=cells["recompute"],
            attention=table["attention"],
            overlap=table["overlap"],
            reduce_bytes=table["reduce_bytes"],
        ),
        setting=Setting(dtype=table["dtype"]),
        seconds=float(cells["seconds"]),
        memory=float(cells["memory_gib"]) * 2.0**30 if cells["memory_gib"] else None,
        fitted=cells["fitted"] == "yes",
        fused_loss=table["fused_loss"],
    )
