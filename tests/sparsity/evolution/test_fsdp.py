"""FSDP, in both versions, on two ranks: masks that stay are those of one process; masks that change are refused."""

from __future__ import annotations

import json
from pathlib import Path

from fresh import Fresh

SCRIPT = Path(__file__).with_name("fsdp_masks.py")


def test_static_masks_train_under_fsdp_and_others_are_refused_in_one_line(fresh: Fresh, tmp_path: Path) -> None:
    files = [tmp_path / f"rank{rank}.json" for rank in range(2)]
    ranks = [
        fresh.start(SCRIPT, str(rank), "2", str(tmp_path / "rendezvous"), str(file)) for rank, file in enumerate(files)
    ]
    for ended in [rank.wait(120) for rank in ranks]:
        assert ended.returncode == 0, ended.stderr
    for file in files:
        found = json.loads(file.read_text())
        assert found["local"] == found["values"] // 2  # it really is sharded
        assert found["off"] < 1e-12
        assert found["off, older"] < 1e-12
        refused = "RigL: FSDP has sharded the layers, and masks cannot change under FSDP; use DDP, or Static masks"
        assert found["refused"] == dict.fromkeys(("fully_shard", "older", "older, flat"), refused)
        late = "MaskManager: FSDP has sharded the model; build the manager first, from the bare model"
        assert found["too late"] == dict.fromkeys(("fully_shard", "older", "older, flat"), late)
