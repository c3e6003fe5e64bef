"""Adaptation to another language: what is added, what stays, what is measured, and what comes after."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from languages import ARABIC, LATIN, VOWELS, documents, words
from rich.console import Console
from runs import assert_same_run, stop_after
from torch import Tensor

from sparsetrain.cli import main
from sparsetrain.data import DataConfig
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.errors import UserError
from sparsetrain.report.show import show_run
from sparsetrain.runs.checkpoint import load_checkpoint
from sparsetrain.settings import build
from sparsetrain.sparsity import sparse_layers
from sparsetrain.stages import AdaptConfig, PipelineConfig, PretrainConfig, RunResult, adapt, pipeline, pretrain
from sparsetrain.stages.generate import load_run
from sparsetrain.stages.plan import plan_of
from sparsetrain.training.state import Interrupted

CPU = torch.device("cpu")
ENGLISH = [text.replace("\n", " ") for text in documents(words(LATIN), 60)]
# One English document has Arabic letters, and must be split as before too.
ENGLISH[7] += " " + "".join(ARABIC[:3])
FOREIGN = [text.replace("\n", " ") for text in documents(words(ARABIC, VOWELS), 60, seed=1)]
SMALL: dict[str, Any] = {
    "budget": {"steps": 4, "batch_size": 4},
    "loop": {"log_every": 1, "eval_every": 0, "eval_sequences": 2, "checkpoint_every": 0},
    "device": "cpu",
}
# Outputs of these tiny layers may lose all weights.
pytestmark = pytest.mark.filterwarnings("ignore:.* have no weight")

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapt")
    (folder / "en.txt").write_text("\n\n".join(ENGLISH), encoding="utf-8")
    (folder / "plain.txt").write_text("\n\n".join(ENGLISH[:5]))
    (folder / "ar.txt").write_text("\n\n".join(FOREIGN), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(home / "cache"))


@pytest.fixture(scope="module")
def make(home: Path) -> Make:
    """Return the configuration of a run on the two languages; ``sparse`` says which model."""
    sources = {"english": {"path": str(home / "en.txt")}, "arabic": {"path": str(home / "ar.txt")}}

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
            values["data"] = {"path": str(home / "en.txt"), "vocab_size": 320, "context": 16}
        given = {key: str(value) if isinstance(value, Path) else value for key, value in top.items()}
        return build(kind, {**values, **given})

    return configuration


@pytest.fixture(scope="module")
def bases(home: Path, make: Make) -> dict[bool, Path]:
    """A sparse model with an untied head, and a dense one with a tied head, both of English."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSETRAIN_CACHE", str(home / "cache"))
        for sparse in (True, False):
            found[sparse] = home / f"base-{sparse}"
            pretrain(make(PretrainConfig, sparse, run_dir=found[sparse]), Console(file=io.StringIO()))
    return found


@pytest.fixture(scope="module")
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


def weights(directory: Path) -> dict[str, Tensor]:
    return load_checkpoint(directory / "checkpoints").model


def by_hand(directory: Path, text: list[str], context: int = 16) -> float:
    """Return the bits per byte of texts, one window after the other, with torch's own cross-entropy."""
    (model, _), tokenizer = load_run(directory, CPU), Tokenizer.load(directory)
    ids = [tokenizer.eos_id, *(token for one in text for token in [*tokenizer.encode(one), tokenizer.eos_id])]
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, context):
            window = torch.tensor(ids[start : start + context + 1])
            nats += F.cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum").item()
    return nats / math.log(2) / sum(len(one.encode()) for one in text)


def validation(directory: Path, name: str, home: Path) -> list[str]:
    """Return the documents of a corpus that the run did not train on."""
    seen = set((directory / "train_ids.txt").read_text().split())
    source = DataConfig(path=str(home / f"{name[:2]}.txt")).source()
    return [document.text for document in source.documents() if document.id not in seen]


def test_what_is_measured_is_the_loss_over_the_bytes_of_the_text(
    first: RunResult, bases: dict[bool, Path], home: Path
) -> None:
    found = first["adaptation"]
    for name in ("english", "arabic"):
        text = validation(first.directory, name, home)
        entry = found["corpora"][name]
        assert entry["bytes"] == sum(len(one.encode()) for one in text)
        assert entry["bits_per_byte"]["before"] == pytest.approx(by_hand(bases[True], text), rel=1e-5)
        assert entry["bits_per_byte"]["after"] == pytest.approx(by_hand(first.directory, text), rel=1e-5)
        old, new = (Tokenizer.load(place) for place in (bases[True], first.directory))
        for which, tokenizer in (("old", old), ("new", new)):
            tokens = sum(len(tokenizer.encode(one)) for one in text)
            assert entry["tokens_per_byte"][which] == tokens / entry["bytes"]
            assert entry["tokens_per_word"][which] == tokens / sum(len(one.split()) for one in text)
        assert entry["val_loss"]["before"] != entry["val_loss"]["after"]
    assert (
        found["corpora"]["arabic"]["tokens_per_byte"]["new"]
        < 0.7 * found["corpora"]["arabic"]["tokens_per_byte"]["old"]
    )
    english = found["corpora"]["english"]["bits_per_byte"]
    assert found["forgetting"] == english["after"] - english["before"]
    # The text of the first language is split as before, also the document with letters of the other.
    assert all(new.encode(text) == old.encode(text) for text in ENGLISH)


def test_before_is_the_model_as_its_own_run_had_it(make: Make, bases: dict[bool, Path], home: Path) -> None:
    config = make(AdaptConfig, False, init_from=bases[False], run_dir=home / "rescaled", vocabulary={"n_tokens": 30})
    config.parameterization = replace(config.parameterization, alpha_out=4.0)  # another function at the start
    found = adapt(config, Console(file=io.StringIO()))["adaptation"]
    bits = found["corpora"]["english"]["bits_per_byte"]
    text = validation(home / "rescaled", "english", home)
    assert bits["before"] == pytest.approx(by_hand(bases[False], text), rel=1e-5)
    assert bits["initialised"] != pytest.approx(bits["before"], rel=1e-3)
    assert found["forgetting"] == bits["after"] - bits["before"]


def test_the_resulting_model_is_recorded_and_only_embeddings_were_trained(
    first: RunResult, bases: dict[bool, Path]
) -> None:
    old, new = weights(bases[True]), weights(first.directory)
    tokens = Tokenizer.load(bases[True]).vocab_size
    rows = -(-(tokens + 30) // 8) * 8
    assert first["model"]["n_layers"] == 3
    assert first["model"]["vocab_size"] == len(new["embed.weight"]) == len(new["head.weight"]) == rows
    assert first["adaptation"]["new_rows"] == 30
    assert first["trained_parameters"] == 2 * rows * 16
    # Two blocks and one new one: it stands behind the second.
    for name, value in old.items():
        if name.startswith("blocks."):
            assert torch.equal(new[name], value), name
            copied = new[name.replace("blocks.1.", "blocks.2.")]
            if name.startswith("blocks.1.") and name.split(".", 2)[2] in {
                f"{layer}.{leaf}" for layer in ("attn.out", "mlp.down") for leaf in ("values", "bias")
            }:
                assert torch.equal(copied, torch.zeros_like(value))
            elif name.startswith("blocks.1."):
                assert torch.equal(copied, value)
        elif name not in ("embed.weight", "head.weight"):
            assert torch.equal(new[name], value), name
    model, _ = load_run(first.directory, CPU)
    densities = {name: layer.pattern.density for name, layer in sparse_layers(model)}
    assert len(densities) == 15
    assert set(densities.values()) == {0.5}
    assert model.logit_scale == 2.0 / (16 / 8)
    norms = first["adaptation"]["row_norms"]["initialised"]
    assert norms["embed.weight"]["new"] == pytest.approx(norms["embed.weight"]["old"], rel=1e-5)


@pytest.mark.parametrize(("sparse", "new_blocks"), [(True, 1), (False, 2)])
def test_new_blocks_change_nothing_at_first(
    sparse: bool, new_blocks: int, bases: dict[bool, Path], make: Make, tmp_path: Path, screen: Console
) -> None:
    config = make(
        AdaptConfig,
        sparse,
        init_from=bases[sparse],
        run_dir=tmp_path / "deeper",
        new_blocks=new_blocks,
        train="blocks",
        budget={"steps": 1, "batch_size": 4},
    )
    tokens = torch.arange(64).view(4, 16)
    model, _ = load_run(bases[sparse], CPU)
    found = adapt(config, screen)
    entry = found["adaptation"]["corpora"]["english"]["bits_per_byte"]
    assert entry["initialised"] == entry["before"]
    # One step has made the new blocks do something; without it, the logits are the same bits.
    deeper, _ = load_run(found.directory, CPU)
    places = {1: (2,), 2: (1, 3)}[new_blocks]
    old = weights(bases[sparse])
    kept = [place for place in range(2 + new_blocks) if place not in places]
    for name, value in weights(found.directory).items():
        place = int(name.split(".")[1]) if name.startswith("blocks.") else None
        if place in kept:
            assert torch.equal(value, old[name.replace(f"blocks.{place}.", f"blocks.{kept.index(place)}.")])
    with torch.no_grad():
        assert not torch.equal(deeper(tokens), model(tokens))
        for place in places:
            block: Any = deeper.blocks[place]
            for layer in (block.attn.out, block.mlp.down):
                for parameter in layer.parameters():
                    assert bool(parameter.any())
                    parameter.zero_()
        assert torch.equal(deeper(tokens), model(tokens))


@pytest.mark.parametrize("sparse", [True, False])
def test_old_rows_keep_their_bits_and_new_ones_are_those_of_torch(
    sparse: bool, bases: dict[bool, Path], make: Make, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(
        AdaptConfig,
        sparse,
        init_from=bases[sparse],
        run_dir=tmp_path / "rows",
        vocabulary={"n_tokens": 20},
        train="new_rows",
        optimizer={"lr": 0.1, "weight_decay": 0.5},
    )
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted, match="stopped after step 2 of 4"):
            adapt(config, screen)
    cut = adapt(config, screen)
    whole = adapt(make(AdaptConfig, sparse, **{**given(config), "run_dir": tmp_path / "whole"}), screen)
    assert_same_run(tmp_path / "rows", tmp_path / "whole")
    assert cut["adaptation"] == whole["adaptation"]
    old, new = weights(bases[sparse]), weights(cut.directory)
    count = len(old["embed.weight"])
    for name in ("embed.weight", "head.weight"):
        assert torch.equal(new[name][:count], old[name])
        assert bool((new[name][count:].norm(dim=1) > 0).all())
    assert all(
        torch.equal(new[name], value) for name, value in old.items() if name not in ("embed.weight", "head.weight")
    )
    assert cut["trained_parameters"] == 20 * 16 * (2 if sparse else 1)


def given(config: AdaptConfig) -> dict[str, Any]:
    """Return the settings of a run that it does not have from `make`."""
    names = ("init_from", "run_dir", "vocabulary", "train", "optimizer")
    return {name: getattr(config, name) for name in names}


def test_chains_forget_since_their_start_and_other_stages_begin_from_them(
    first: RunResult, home: Path, make: Make, tmp_path: Path, screen: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    second = ["adapt", f"init_from={first.directory}", f"run_dir={tmp_path / 'second'}", "data.context=16"]
    second += ["budget.steps=3", "budget.batch_size=4", "loop.eval_every=0"]
    second += [f"data.sources={{english: {{path: {home / 'en.txt'}}}, arabic: {{path: {home / 'ar.txt'}}}}}"]
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
        data={"path": str(home / "en.txt"), "vocab_size": 320, "context": 16},
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
    sources = {"arabic": {"path": str(home / "ar.txt")}}
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
            {"vocabulary": {"n_tokens": 9}, "data": {"path": "plain.txt", "context": 16}},
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
        data = {"path": str(home / "en.txt"), "tokenizer": "bytes", "context": 16}
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
    data = {"sources": {"english": {"path": str(home / "en.txt")}, "other": {"path": str(tmp_path / "la.txt")}}}
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
    source = DataConfig(path=str(home / "en.txt")).source()
    kept = [document.text for document in source.documents() if document.id in seen]
    assert len(kept) > 40
    assert all(old.encode(text) == new.encode(text) for text in kept)
    assert any(old.encode(text) != new.encode(text) for text in other)
