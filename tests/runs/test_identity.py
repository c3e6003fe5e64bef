"""Identity of runs: properties over made-up schemas, and over the settings of all kinds of run."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sparsetrain.data import Tokenizer
from sparsetrain.errors import UserError
from sparsetrain.runs.claim import claimed
from sparsetrain.runs.identity import differences, digest, find_run, run_place
from sparsetrain.runs.layout import CONFIG, RESULT, TOKENIZER, TRAIN_IDS
from sparsetrain.runs.origin import Origin
from sparsetrain.runs.recorded import FORMAT, Recorded, read_recorded
from sparsetrain.stages import FinetuneConfig, PipelineConfig, PretrainConfig, PromptConfig
from sparsetrain.stages.config import RunConfig, as_plain, identify
from sparsetrain.studies.coordinates import CoordinatesConfig

Configure = Callable[..., Any]
TEXT = Origin("text-0", None, Tokenizer.bytes(), {"a", "b"})
KINDS = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "prompt": PromptConfig,
    "pipeline": PipelineConfig,
    "coord-check": CoordinatesConfig,
}


@dataclass
class Item:
    share: float
    name: str | None = None


@dataclass
class Inner:
    rate: float = 0.5
    items: list[Item] = field(default_factory=list)


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    count: int = 1
    words: list[str] = field(default_factory=lambda: ["a"])
    threads: int | None = None


@dataclass
class LaterItem(Item):
    late: float = 0.25


@dataclass
class LaterInner(Inner):
    items: list[LaterItem] = field(default_factory=list)  # type: ignore[assignment]
    late: str = "as ever"


@dataclass
class LaterOuter(Outer):
    inner: LaterInner = field(default_factory=LaterInner)
    maybe: LaterInner | None = None
    section: LaterInner = field(default_factory=lambda: LaterInner(rate=2.0))
    late: int = 7


rates = st.sampled_from([0.0, 0.5, 1, 2.5])
inners = st.builds(Inner, rates, st.lists(st.builds(Item, rates, st.none() | st.just("x")), max_size=2))
outers = st.builds(Outer, inners, st.none() | inners, st.integers(0, 2), st.lists(st.sampled_from("ab"), max_size=2))


def settings_of(configure: Configure, verb: str, **top: Any) -> Any:
    if verb != "coord-check":
        return configure(KINDS[verb], **top)
    common = configure(PretrainConfig, **top)
    return CoordinatesConfig(**{entry.name: getattr(common, entry.name) for entry in dataclasses.fields(RunConfig)})


def of(config: Any, schema: type | None = None, **facts: str | None) -> Recorded:
    plain = dataclasses.asdict(config)
    return Recorded("pretrain", schema or type(config), plain, {"corpus": "text-0", "source": None, **facts})


def read(run: Recorded, schema: type) -> Recorded:
    """Return the run as a version with the settings of ``schema`` reads it."""
    return dataclasses.replace(run, schema=schema)


@given(outers)
def test_settings_that_came_later_rename_no_run_and_make_no_difference(config: Outer) -> None:
    run = of(config)
    later = {**copy.deepcopy(run.values), "late": 7, "section": dataclasses.asdict(LaterInner(rate=2.0))}
    for section in (later["inner"], later["maybe"]):
        if section is not None:
            section["late"] = "as ever"
            section["items"] = [{**item, "late": 0.25} for item in section["items"]]
    now = Recorded("pretrain", LaterOuter, later, run.facts)
    assert digest(now) == digest(run) == digest(read(run, LaterOuter))
    assert differences(now, read(run, LaterOuter)) == []
    now.values["inner"]["late"] = "else"
    assert digest(now) != digest(run)
    assert differences(now, read(run, LaterOuter)) == ["inner.late=else (there: as ever)"]


@given(outers, outers)
def test_runs_have_one_name_exactly_if_their_settings_are_equal(one: Outer, other: Outer) -> None:
    assert (digest(of(one)) == digest(of(other))) == (one == other) == (not differences(of(one), of(other)))


@given(outers, st.randoms(use_true_random=False))
def test_order_and_the_way_a_number_is_written_do_not_count(config: Outer, draw: random.Random) -> None:
    def shuffled(value: Any) -> Any:
        if isinstance(value, dict):
            names = list(value)
            draw.shuffle(names)
            return {name: shuffled(value[name]) for name in names}
        if isinstance(value, list):
            return [shuffled(item) for item in value]
        return float(value) if isinstance(value, int) else value

    run = of(config)
    other = dataclasses.replace(run, values=shuffled(run.values))
    assert digest(run) == digest(other)
    assert differences(run, other) == []


@pytest.mark.parametrize("flag", [False, True])
def test_truth_is_no_number(flag: bool) -> None:
    schema = make_dataclass("Flagged", [("flag", bool, flag)])
    runs = [Recorded("pretrain", schema, {"flag": value}, {}) for value in (flag, int(flag))]
    assert digest(runs[0]) != digest(runs[1])


def leaves(schema: type, values: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in values.items():
        found += leaves(schema, value, (*path, name)) if isinstance(value, dict) else [(*path, name)]
    return found


@pytest.mark.parametrize("verb", KINDS)
def test_every_setting_counts_but_the_incidental_ones_and_the_datas(configure: Configure, verb: str) -> None:
    run = identify(verb, settings_of(configure, verb), TEXT)
    own = digest(run)
    incidental = {
        *("init_from", "run_dir", "runs_dir", "device", "threads", "draw", "force"),
        *("log_every", "checkpoint_every", "keep_last", "observe"),
    }
    for path in leaves(run.schema, run.values):
        changed = copy.deepcopy(run)
        section = changed.values
        for name in path[:-1]:
            section = section[name]
        section[path[-1]] = "another value"
        same = path[-1] in incidental or (path[0] == "data" and path[-1] not in ("context", "mixture"))
        assert (digest(changed) == own) == same, path
        assert (differences(changed, run) == []) == same, path
    for name, value in {"corpus": "text-1", "source": "step-00000012-ab"}.items():
        other = dataclasses.replace(run, facts={**run.facts, name: value})
        assert digest(other) != own
        assert differences(other, run) == [f"{name}={value} (there: {run.facts[name]})"]
    assert digest(dataclasses.replace(run, kind="other")) != own


def test_a_model_setting_at_its_default_is_as_good_as_none(configure: Configure) -> None:
    run = identify("pretrain", configure(PretrainConfig), TEXT)
    said = identify("pretrain", configure(PretrainConfig, {"model.bias": False, "model.d_ff": None}), TEXT)
    assert digest(run) == digest(said)
    assert differences(run, said) == differences(said, run) == []
    seeded = identify("pretrain", configure(PretrainConfig, {"model.seed": 0}), TEXT)
    assert digest(seeded) != digest(run)  # its own seed does not follow the run's


def test_differing_corpora_are_named_by_the_settings_that_differ(configure: Configure) -> None:
    run = identify("pretrain", configure(PretrainConfig), TEXT)
    other = identify("pretrain", configure(PretrainConfig, {"data.max_documents": 9}), TEXT)
    assert differences(run, other) == []  # still the same text
    other.facts["corpus"] = "text-1"
    assert differences(run, other) == ["data.max_documents=None (there: 9)"]


# Files of format 1.


def write(directory: Path, content: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return directory


@pytest.mark.parametrize("verb", KINDS)
def test_a_directory_of_format_1_is_the_run_that_it_was(configure: Configure, tmp_path: Path, verb: str) -> None:
    run = identify(verb, settings_of(configure, verb, runs_dir=tmp_path), TEXT)
    old = {**copy.deepcopy(run.values), "corpus": "text-0", "source": None}
    del old["sparsity"]["evolution"]["grown_moments"]  # which was added later
    there = read_recorded(write(tmp_path / f"{verb}-0123abcd", old), run.schema)
    assert (there.format, there.kind) == (1, verb)
    assert digest(there) == digest(run)
    assert differences(run, there, TEXT) == []
    assert run_place(tmp_path, f"{verb}-", run, TEXT) == tmp_path / f"{verb}-0123abcd"
    with claimed(tmp_path / f"{verb}-0123abcd", run, TEXT) as done:
        assert done is None
    again = read_recorded(write(tmp_path / "new", run.plain()), run.schema)
    assert (again.format, again.kind, again.facts) == (FORMAT, verb, run.facts)
    assert differences(run, again) == []


def test_a_directory_without_a_corpus_is_told_by_its_tokenizer_and_its_documents(
    configure: Configure, tmp_path: Path
) -> None:
    run = identify("pretrain", configure(PretrainConfig), TEXT)
    old = {**run.values, "data": {**run.values["data"], "path": "moved"}}
    there = read_recorded(write(tmp_path / "run", old), PretrainConfig)
    assert [text.partition("=")[0] for text in differences(run, there, TEXT)] == ["data.path"]
    TEXT.tokenizer.save(tmp_path / "run" / TOKENIZER)
    (tmp_path / "run" / TRAIN_IDS).write_text("b\na\n")
    assert differences(run, there, TEXT) == []
    (tmp_path / "run" / TRAIN_IDS).write_text("b\nc\n")
    assert [text.partition("=")[0] for text in differences(run, there, TEXT)] == ["data.path"]


def test_a_task_counts_by_its_content_and_an_old_one_by_its_path_while_that_is_there(
    configure: Configure, questions: Path, tmp_path: Path
) -> None:
    run = identify("finetune", configure(FinetuneConfig), TEXT, {"task_fingerprint": "0123"})
    moved = configure(FinetuneConfig, {"task.path": str(tmp_path)})
    assert digest(identify("finetune", moved, TEXT, {"task_fingerprint": "0123"})) == digest(run)
    other = identify("finetune", moved, TEXT, {"task_fingerprint": "4567"})
    assert differences(other, run) == ["task_fingerprint=4567 (there: 0123)"]
    old = identify("finetune", moved, TEXT)
    assert differences(run, old) == [f"task.path={questions} (there: {tmp_path})"]
    gone = identify("finetune", configure(FinetuneConfig, {"task.path": str(tmp_path / "gone")}), TEXT)
    assert differences(run, gone) == []
    few = identify(
        "finetune", configure(FinetuneConfig, {"task.path": str(tmp_path / "gone"), "task.n_train": 3}), TEXT
    )
    assert differences(run, few) == ["task.n_train=1000 (there: 3)"]


# Finding a run.


def test_a_run_is_found_whatever_its_directory_is_called(configure: Configure, tmp_path: Path) -> None:
    run = identify("pretrain", configure(PretrainConfig), TEXT)
    named = tmp_path / f"pretrain-{digest(run)}"
    assert run_place(tmp_path / "none", "pretrain-", run) == tmp_path / "none" / named.name
    write(tmp_path / "named", {**run.plain(), "run_dir": "named"})
    write(tmp_path / "other", {**run.plain(), "seed": 1})
    write(tmp_path / "kind", {**run.plain(), "kind": "coord-check"})
    write(tmp_path / "damaged", "a: [")
    write(tmp_path / "cut", yaml.safe_dump(run.plain(), sort_keys=False)[:-30])
    assert run_place(tmp_path, "pretrain-", run) == named
    later = write(tmp_path / "z", run.plain())
    assert run_place(tmp_path, "pretrain-", run) == later
    earlier = write(tmp_path / "y", run.plain())
    assert run_place(tmp_path, "pretrain-", run) == earlier
    (later / RESULT).touch()
    assert find_run(tmp_path, "pretrain-", run) == later  # the finished one
    old = write(tmp_path / "pretrain-0123abcd", {key: run.plain()[key] for key in run.plain() if key != "format"})
    assert find_run(tmp_path, "pretrain-", run) == old
    assert run_place(tmp_path, "pretrain-", run) == old
    named.mkdir()
    assert run_place(tmp_path, "pretrain-", run) == named


def test_each_directory_is_read_once_while_it_does_not_change(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [identify("pretrain", configure(PretrainConfig, {"seed": seed}), TEXT) for seed in range(6)]
    for number, run in enumerate(runs):
        write(tmp_path / f"run-{number}", run.plain())
    read_files = []
    from sparsetrain.runs import identity

    true_read = identity.read_text
    monkeypatch.setattr(identity, "read_text", lambda path, most: read_files.append(path) or true_read(path, most))
    assert [run_place(tmp_path, "x-", run).name for run in runs] == [f"run-{number}" for number in range(6)]
    assert len(read_files) == 6
    write(tmp_path / "run-0", {**runs[0].plain(), "seed": 77})
    os.utime(tmp_path / "run-0" / CONFIG, ns=(1, 1))
    assert find_run(tmp_path, "x-", runs[0]) is None
    assert len(read_files) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: text.index("corpus")], "is incomplete: it has no corpus"),
        (lambda text: text[: len(text) // 2], "is incomplete: it has no |cannot be read: "),
        (lambda text: "", "holds no configuration"),
        (lambda text: text.replace("format: 3", "format: 99"), "format=99 is of a later version"),
        (lambda text: text.replace("format: 3", "format: two"), "format='two' must be a whole number"),
        (lambda text: text.replace("kind: pretrain", "kind: 3"), "kind=3 must be text"),
        (lambda text: text.replace("corpus: text-0", "corpus: [1]"), r"corpus=\[1\] must be text"),
    ],
)
def test_a_damaged_configuration_is_one_line(
    configure: Configure, tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    run = identify("pretrain", configure(PretrainConfig), TEXT)
    directory = write(tmp_path / "run", change(yaml.safe_dump(run.plain(), sort_keys=False)))
    with pytest.raises(UserError, match=message) as caught:
        read_recorded(directory, PretrainConfig)
    assert "\n" not in str(caught.value)
    assert str(directory / CONFIG) in str(caught.value)


def test_paths_are_recorded_absolute(configure: Configure) -> None:
    plain = as_plain(configure(PretrainConfig, {"data.path": "notes.txt"}))
    assert Path(plain["data"]["path"]).is_absolute()
