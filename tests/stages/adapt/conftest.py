"""Fixtures for the tests of adaptations: texts, models of the first language, and one that is adapted."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
from adapting import ENGLISH, FOREIGN, SMALL, Make
from rich.console import Console

from sparsetrain.settings import build
from sparsetrain.stages import AdaptConfig, PretrainConfig, RunResult, adapt, pretrain


@pytest.fixture(scope="package")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapt")
    (folder / "en.txt").write_text("\n\n".join(ENGLISH), encoding="utf-8")
    (folder / "plain.txt").write_text("\n\n".join(ENGLISH[:5]))
    (folder / "ar.txt").write_text("\n\n".join(FOREIGN), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(home / "cache"))


@pytest.fixture(scope="package")
def make(home: Path) -> Make:
    """Return the configuration of a run on the two languages; ``sparse`` says which model."""
    sources = {
        "english": {"path": str(home / "en.txt"), "separator": "blank_line"},
        "arabic": {"path": str(home / "ar.txt"), "separator": "blank_line"},
    }

    def configuration(kind: type, sparse: bool = True, **top: Any) -> Any:
        shape = {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_context": 16}
        untied = {"tie_embeddings": False, "positions": "learned", "bias": True, "mlp": "swiglu"}
        values: dict[str, Any] = {
            "model": {**shape, **(untied if sparse else {})},
            "sparsity": {"sparsity": 0.5 if sparse else 0.0},
            "parameterization": {"scheme": "mup", "base_width": 8, "alpha_out": 2.0},
            "data": {"sources": sources, "context": 16},
            **copy.deepcopy(SMALL),
        }
        if kind is PretrainConfig:
            values["data"] = {"path": str(home / "en.txt"), "separator": "blank_line", "vocab_size": 320, "context": 16}
        given = {key: str(value) if isinstance(value, Path) else value for key, value in top.items()}
        return build(kind, {**values, **given})

    return configuration


@pytest.fixture(scope="package")
def bases(home: Path, make: Make) -> dict[bool, Path]:
    """A sparse model with an untied head, and a dense one with a tied head, both of English."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSETRAIN_CACHE", str(home / "cache"))
        for sparse in (True, False):
            found[sparse] = home / f"base-{sparse}"
            pretrain(make(PretrainConfig, sparse, run_dir=found[sparse]), Console(file=io.StringIO()))
    return found


@pytest.fixture(scope="package")
def first(home: Path, make: Make, bases: dict[bool, Path]) -> RunResult:
    """Thirty tokens and a block, of which only embeddings were trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSETRAIN_CACHE", str(home / "cache"))
        config = make(
            AdaptConfig,
            init_from=bases[True],
            run_dir=home / "first",
            vocabulary={"n_tokens": 30, "multiple_of": 8},
            new_blocks=1,
            train="embeddings",
        )
        return adapt(config, Console(file=io.StringIO()))
