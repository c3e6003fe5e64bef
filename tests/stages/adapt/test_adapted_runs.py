"""Chains and pipelines of adaptations, donors, other tokenizers, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import ENGLISH, FOREIGN, SMALL, Make, weights
from languages import LATIN, documents, words
from rich.console import Console

from sparsetrain.cli import main
from sparsetrain.data import DataConfig
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.errors import UserError
from sparsetrain.report.show import show_run
from sparsetrain.stages import AdaptConfig, PipelineConfig, PretrainConfig, RunResult, adapt, pipeline, pretrain
from sparsetrain.stages.plan import plan_of

# Outputs of these tiny layers may lose all weights.
pytestmark = pytest.mark.filterwarnings("ignore:.* have no weight")

FILES = {"english": "en.txt", "arabic": "ar.txt"}


def test_chains_forget_since_their_start_and_other_stages_begin_from_them(
    first: RunResult, home: Path, make: Make, tmp_path: Path, screen: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    second = ["adapt", f"init_from={first.directory}", f"run_dir={tmp_path / 'second'}", "data.context=16"]
    second += ["budget.steps=3", "budget.batch_size=4", "loop.eval_every=0"]
    texts = [f"{name}: {{path: {home / file}, separator: blank_line}}" for name, file in FILES.items()]
    second += [f"data.sources={{{', '.join(texts)}}}"]
    assert main(["plan", *second]) == 0
    assert ": new\n" in capsys.readouterr().out
    assert main(second) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "second" / "result.json").read_text())["adaptation"]
    assert found["origin"] == first["adaptation"]["origin"]
    before, at_first = (entry["adaptation"]["corpora"]["english"]["bits_per_byte"] for entry in (first, first))
    now = found["corpora"]["english"]["bits_per_byte"]
    assert now["before"] == now["initialised"] == before["after"]
    assert found["forgetting"] == now["after"] - at_first["before"]
    assert found["new_rows"] == 0
    assert f"since the first adaptation began: {found['forgetting']:+.4f}." in " ".join(shown.split())
    show_run(tmp_path / "second", screen)
    assert isinstance(screen.file, io.StringIO)
    assert f"{now['after']:.4f}" in screen.file.getvalue()
    words = ["data.context=16", "budget.steps=1", "budget.batch_size=2"]
    start = f"init_from={tmp_path / 'second'}"
    assert main(["pretrain", start, f"data.path={home / 'ar.txt'}", *words, f"run_dir={tmp_path / 'third'}"]) == 0
    assert Tokenizer.load(tmp_path / "third").sha256 == Tokenizer.load(first.directory).sha256
    assert main(["generate", start, "prompt=the", "max_new_tokens=2"]) == 0
    assert main(["quantize", str(tmp_path / "second"), f"out={tmp_path / 'small'}"]) == 0
    # The same words again find the run that is done.
    assert main(second) == 0
    assert "already done" in capsys.readouterr().out


def test_a_pipeline_adapts_with_the_tokenizer_of_its_first_stage(
    home: Path, make: Make, tmp_path: Path, screen: Console
) -> None:
    both = {"path": None, "sources": make(AdaptConfig).data.sources}
    own = {"budget": {"steps": 2, "batch_size": 4}, "loop": SMALL["loop"]}
    config = make(
        PipelineConfig,
        run_dir=tmp_path / "pipeline",
        data={"path": str(home / "en.txt"), "separator": "blank_line", "vocab_size": 320, "context": 16},
        pipeline={
            "arms": {},
            "stages": [
                {"name": "pretrain"},
                {
                    "name": "adapt",
                    "from": "pretrain",
                    "data": both,
                    "new_blocks": 1,
                    "vocabulary": {"n_tokens": 10, "multiple_of": 32},
                    **own,
                },
                {"name": "again", "run": "pretrain", "from": "adapt", "budget": {"steps": 1, "batch_size": 4}},
            ],
        },
    )
    planned = plan_of(config)
    assert [run.steps for run in planned.runs] == [4, 2, 1]
    assert pipeline(config, screen).complete
    place = tmp_path / "pipeline" / "run"
    old, new, last = (Tokenizer.load(place / name) for name in ("pretrain", "adapt", "again"))
    assert new.spellings[: old.vocab_size] == old.spellings
    assert new.vocab_size == old.vocab_size + 10
    assert last.sha256 == new.sha256
    results = {name: json.loads((place / name / "result.json").read_text()) for name in ("adapt", "again")}
    assert results["again"]["model"] == results["adapt"]["model"]
    assert results["adapt"]["model"]["n_layers"] == 3
    page = (tmp_path / "pipeline" / "report.html").read_text(encoding="utf-8")
    assert "Adaptation: run/adapt" in page
    assert [run.status for run in plan_of(config).runs] == ["done"] * 3


def test_a_donor_counts_by_its_weights(
    first: RunResult, bases: dict[bool, Path], make: Make, tmp_path: Path, screen: Console
) -> None:
    def config(method: str) -> Any:
        return make(
            AdaptConfig,
            init_from=bases[True],
            runs_dir=tmp_path,
            vocabulary={"n_tokens": 30, "method": method, "donor": str(first.directory)},
            budget={"steps": 1, "batch_size": 4},
        )

    done = adapt(config("least_squares"), screen)
    content = (done.directory / "config.yaml").read_text()
    assert "\ndonor: step-00000004-" in content
    assert plan_of(config("least_squares")).runs[0].directory == done.directory
    assert plan_of(config("omp")).runs[0].directory != done.directory


def test_another_tokenizer_keeps_the_rows_of_shared_tokens(
    home: Path, bases: dict[bool, Path], make: Make, tmp_path: Path, screen: Console
) -> None:
    other = Tokenizer.train(ENGLISH + FOREIGN, 400)
    other.save(tmp_path / "other.json")
    sources = {"arabic": {"path": str(home / "ar.txt"), "separator": "blank_line"}}
    data = {"sources": sources, "context": 16, "tokenizer_path": str(tmp_path / "other.json")}
    options = {"vocabulary": {"method": "mean"}, "train": "blocks", "new_blocks": 1}
    config = make(AdaptConfig, False, init_from=bases[False], run_dir=tmp_path / "run", data=data, **options)
    found = adapt(config, screen)
    old, new = Tokenizer.load(bases[False]), Tokenizer.load(found.directory)
    assert new.sha256 == other.sha256
    one, two = weights(bases[False])["embed.weight"], weights(found.directory)["embed.weight"]
    shared = [
        (old.spellings.index(spelling), index)
        for index, spelling in enumerate(new.spellings)
        if spelling in old.spellings
    ]
    assert len(shared) > 260
    assert all(torch.equal(one[here], two[there]) for here, there in shared)
    assert found["adaptation"]["new_rows"] == 400 - len(shared)
    assert found["adaptation"]["forgetting"] is None
    assert isinstance(screen.file, io.StringIO)
    assert "reads a single corpus" in screen.file.getvalue()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_from": None}, "init_from is missing: adapt needs a trained model, init_from=RUN_DIR"),
        ({"init_from": "nowhere"}, "init_from=nowhere: no such run directory"),
        ({"vocabulary": {"corpus": "arabik"}}, "vocabulary.corpus='arabik' is not one of english, arabic"),
        ({"vocabulary": {"n_tokens": -1}}, "vocabulary.n_tokens=-1 must be at least 0"),
        (
            {"vocabulary": {"n_tokens": 10**6}},
            "n_tokens=1000000 is more than the text of arabic gives: at most",
        ),
        ({"vocabulary": {"n_tokens": 9, "method": "omp"}}, "vocabulary.method=omp needs vocabulary.donor"),
        ({"vocabulary": {"n_tokens": 9, "donor": "run"}}, "vocabulary.donor=run: method=subword_mean uses no donor"),
        ({"vocabulary": {"donor": "run", "method": "omp"}}, "vocabulary.donor=run is not used"),
        ({"vocabulary": {"n_tokens": 9, "donor": "gone", "method": "omp"}}, "vocabulary.donor=gone: no such run"),
        ({"vocabulary": {"n_tokens": 9, "donor": "bytes", "method": "omp"}}, "vocabulary.donor: it shares no token"),
        ({"train": "new_rows"}, "train=new_rows needs new tokens"),
        ({"train": "new_rows", "vocabulary": {"n_tokens": 9}, "observe": "noise_scale_all"}, "observe=noise_scale_all"),
        ({"train": "blocks"}, "train=blocks needs new blocks"),
        ({"train": "heads"}, "train='heads' is not one of all, embeddings, new_rows, blocks"),
        ({"new_blocks": 3}, "new_blocks=3 must be at least 0 and at most 2"),
        (
            {"new_blocks": 1, "parameterization": {"scheme": "completep", "base_width": 8, "base_layers": 1}},
            "new_blocks=1 would change what the old blocks compute: parameterization completep",
        ),
        (
            {"vocabulary": {"n_tokens": 9}, "data": {"path": "plain.txt", "separator": "blank_line", "context": 16}},
            "vocabulary.corpus=file has no letter of a script that the tokenizer has no tokens of yet",
        ),
    ],
)
def test_what_cannot_be_adapted_is_one_line_and_leaves_nothing(
    settings: dict[str, Any],
    message: str,
    home: Path,
    bases: dict[bool, Path],
    make: Make,
    tmp_path: Path,
    screen: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(home)
    if settings.get("vocabulary", {}).get("donor") == "bytes" and not (home / "bytes").exists():
        data = {"path": str(home / "en.txt"), "separator": "blank_line", "tokenizer": "bytes", "context": 16}
        short = {"steps": 1, "batch_size": 2}
        pretrain(make(PretrainConfig, False, data=data, run_dir=home / "bytes", budget=short), screen)
    with pytest.raises(UserError) as raised:
        adapt(make(AdaptConfig, **{"init_from": bases[True], "run_dir": tmp_path / "run", **settings}), screen)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_language_of_the_same_script_leaves_the_training_text_split_as_before(
    home: Path, bases: dict[bool, Path], make: Make, tmp_path: Path, screen: Console
) -> None:
    other = [text.replace("\n", " ") for text in documents(words(LATIN, seed=5), 60, seed=6)]
    (tmp_path / "la.txt").write_text("\n\n".join(other))
    data = {
        "sources": {
            "english": {"path": str(home / "en.txt"), "separator": "blank_line"},
            "other": {"path": str(tmp_path / "la.txt"), "separator": "blank_line"},
        }
    }
    config = make(
        AdaptConfig,
        False,
        init_from=bases[False],
        run_dir=tmp_path / "run",
        data={**data, "context": 16},
        vocabulary={"n_tokens": 5},
        budget={"steps": 1, "batch_size": 4},
    )
    found = adapt(config, screen)
    old, new = Tokenizer.load(bases[False]), Tokenizer.load(found.directory)
    seen = set((bases[False] / "train_ids.txt").read_text().split())
    source = DataConfig(path=str(home / "en.txt"), separator="blank_line").source()
    kept = [document.text for document in source.documents() if document.id in seen]
    assert len(kept) > 40
    assert all(old.encode(text) == new.encode(text) for text in kept)
    assert any(old.encode(text) != new.encode(text) for text in other)
