"""A machine whose efficiencies are constants, so that times follow from FLOPs and bytes by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sparsetrain.cost.hardware import Machine, calibrated_path

RATE = 5e8
"""FLOP/s that every product reaches."""
LABEL, DATE = "A processor of constants", "2026-01-02"


def content(bandwidth: str = "1e9 TB/s", skips: str = "unstructured", spread: float | None = 0.1) -> dict[str, Any]:
    """Return the machine's file; at the default bandwidth only products take time."""
    fact = {"kind": "measured", "source": "calibration"}
    document = {
        "label": LABEL,
        "sources": {"calibration": {"title": "constants", "date": DATE}},
        "peak": {"float32": {"value": "1 GFLOP/s", **fact}},
        "memory": [
            {
                "name": "main memory",
                "size": {"value": "64 GB", **fact},
                "bandwidth": {"value": bandwidth, **fact},
            }
        ],
        "zeros": {"skips": skips, **fact},
        "roofline": False,
        "efficiency": {
            **{kind: {"values": 0.5, **fact} for kind in ("linear", "head", "attention")},
            "default": {"values": 1.0, **fact},
        },
    }
    if spread is not None:
        document["spread"] = {"value": spread, **fact}
    return document


def machine(**changes: Any) -> Machine:
    """Return the machine; the arguments are those of `content`."""
    return Machine.from_document(content(**changes), "this", "constants.yaml")


def calibrate(**changes: Any) -> Path:
    """Write the machine into the cache as that at hand, and return the file."""
    path = calibrated_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content(**changes)))
    return path
