"""Every code block of the README and of docs/ runs: commands on a smaller model and corpus, Python as it stands.

A comment of one line above a block says what is special about it: ``<!-- file: PATH -->`` for the content of a file
that later blocks use, ``<!-- makes: PATHS -->`` for Python that writes files which the commands of its page use, and
``<!-- shown only: REASON -->`` for what does not run here.
"""

from __future__ import annotations

import csv
import gc
import math
import re
import shlex
import statistics
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from small_calibration import make_small

import sparsetrain.report.registry
import sparsetrain.training.observers  # noqa: F401 - all registries must exist before `registries` copies them
from sparsetrain import plugins
from sparsetrain.cli import main
from sparsetrain.cli.checks import as_typed, check
from sparsetrain.cli.verbs import VERBS, typed
from sparsetrain.data.sources.wheel import Wheel
from sparsetrain.registry import Registry

ROOT = Path(__file__).parents[2]
PAGES = [Path(name) for name in ("README.md", "CONTRIBUTING.md")]
PAGES += sorted(path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# What makes a command small; it changes no key that the command itself sets.
TINY = ["model=tiny", "parameterization.base_width=32"]
SMALL = {
    "data": ["data.vocab_size=300"],
    "data-dedup": [],
    "pretrain": [*TINY, "data.vocab_size=300", "data.context=64", "budget.batch_size=2", "runs_dir=runs"],
    "finetune": ["task.n_train=20", "task.n_validation=10", "task.n_test=10", "budget.steps=3", "budget.batch_size=4"],
    "generate": ["max_new_tokens=5"],
    "predict": [],
    "report": [],
    "sweep": [],
    "fit": [],
    "suggest": [],
    "provision": [],
    "flops": [],
    "simulate": [],
    "calibrate": ["budget_seconds=0.001", "threads=[1]"],
    "bench": ["shapes=[[32,48]]", "tokens=64", "gpt.d_model=32", "scaling.shape=[32,32]", "repeats=1"],
    "tune": ["threads=[1]", "sides=[64]", "tokens=[16]", "repeats=1"],
    "coord-check": [
        *(*TINY, "data.tokenizer=bytes", "data.context=24"),
        *("budget.batch_size=2", "check.steps=1", "check.values=[0,0.5]"),
    ],
    "mask": [],
    "quantize": [],
    "export": [],
    "import": [],
    "evaluate": ["n_probes=3", "blocks=3"],
}
SMALL["prompt"] = SMALL["finetune"]
SMALL["adapt"] = ["budget.steps=2", "budget.batch_size=2", "data.context=64"]
SMALL["pipeline"] = [
    *(*SMALL["pretrain"], "task.n_train=20", "task.n_validation=10", "task.n_test=10"),
    *(f"pipeline.stages.{stage}.budget.steps=3" for stage in ("finetune", "prompt", "scratch")),
]


UNTRAINED = ("plan", "suggest", "flops", "simulate")
# Plain numbers that a setting takes in turn; the first and the last are kept.
THREE_OR_MORE = re.compile(r"(?<==)([-+.\de]+)(?:,[-+.\de]+)+,([-+.\de]+)$")


class Block(NamedTuple):
    note: str
    language: str
    code: str

    @property
    def file(self) -> str:
        return self.note.removeprefix("file: ") if self.note.startswith("file: ") else ""


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page that run; a block that is only shown is left out."""
    found = [Block(*match) for match in BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))]
    return [block for block in found if not block.note.startswith("shown only: ")]


def write_files(page: Path) -> None:
    for block in blocks(page):
        if block.file:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.code, encoding="utf-8")
        if block.note.startswith("makes: "):
            exec(compile(block.code, str(page), "exec", dont_inherit=True), {})
            assert all(Path(name).exists() for name in block.note.removeprefix("makes: ").split(", "))


def lines(program: str) -> Iterator[list[str]]:
    """Yield the words behind ``program`` of every line of a shell block, in the order of the pages."""
    for page in PAGES:
        for block in blocks(page):
            if block.language == "bash" and not block.file:
                for line in block.code.replace("\\\n", " ").splitlines():
                    first, *words = shlex.split(line, comments=True) or [""]
                    if first == program == "sparsetrain":
                        name, rest = typed(words)
                        yield [name, *rest]
                    elif first == program:
                        yield words


def smaller(verb: str, words: list[str]) -> list[str]:
    """Return ``words`` on a smaller model: what a command says of its length is made shorter, nothing else changes.

    A command that trains nothing has no `SMALL` and only fewer points: of three or more values the first and the last.
    """
    words = [THREE_OR_MORE.sub(r"\1,\2", word) for word in words]
    if verb in UNTRAINED:
        return words
    small = SMALL[verb]
    if "pipeline=pretrain" in words:
        small = [word for word in small if not word.startswith("pipeline.stages.")]  # it has one stage
    if any(word.startswith("runs_dir=") for word in words):
        small = [word for word in small if not word.startswith("runs_dir=")]
    lengths = {r"^(budget\.tokens)=.*": r"\1=384", r"^(validate)=.*": r"\1=2"}
    for said, made in lengths.items():
        words = [re.sub(said, made, word) for word in words]
    if "budget.steps=3" in small:
        words = [word for word in words if not word.startswith("budget.epochs=")]
    typed_keys = [word.partition("=")[0] for word in small]
    words = [word for word in words if verb != "calibrate" or word.partition("=")[0] not in typed_keys] + small
    if verb in ("pretrain", "pipeline") and not any(word.startswith("budget.tokens=") for word in words):
        words.append("budget.steps=2")
    return words


def test_every_block_is_one_that_runs() -> None:
    for page in PAGES:
        for block in blocks(page):
            where = f"{page}:\n{block.code}"
            assert block.file or block.language in ("bash", "python"), where
            if block.language == "bash" and not block.file:
                rows = block.code.replace("\\\n", " ").splitlines()
                assert all(row.startswith(("sparsetrain ", "make ")) for row in rows), where


def test_what_is_shown_only_is_little() -> None:
    """A block that cannot run here has to be added to this list."""
    shown = [
        code.strip()
        for page in PAGES
        for note, _, code in BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
        if note.startswith("shown only: ")
    ]
    assert shown == ["pip install ."]


def test_every_verb_has_a_command_on_a_page() -> None:
    assert {words[0] for words in lines("sparsetrain")} == {"plan", *SMALL} == set(VERBS)


def test_make_targets_of_the_pages_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {words[0] for words in lines("make")}
    assert {"demo", "test"} <= targets
    assert [target for target in targets if f"\n{target}:" not in makefile] == []


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What a page registers is forgotten after it, and so are its modules."""
    gc.unfreeze()  # `get_objects` leaves out what is frozen
    for found in gc.get_objects():
        if type(found) is Registry:  # isinstance asks proxies of other libraries for what they stand for
            monkeypatch.setattr(found, "_things", dict(found._things))
    gc.freeze()
    monkeypatch.setenv(plugins.VARIABLE, "")
    monkeypatch.setattr(plugins, "_loaded", set())
    yield
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the tokenizer .* may not give a text back")  # as its page says
@pytest.mark.usefixtures("registries")
def test_commands_of_the_pages_run(
    small_medline: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command once, in the order of the pages; RUN_DIR is the directory of the first pre-training."""
    monkeypatch.chdir(tmp_path)
    make_small(monkeypatch, tmp_path)
    for page in PAGES:
        write_files(page)
    run_dir, done = "", []
    for verb, *words in lines("sparsetrain"):
        if (verb, words) in done:
            continue
        done.append((verb, words))
        words = [word.replace("RUN_DIR", run_dir) for word in words]
        if "-m" in words and any(map(THREE_OR_MORE.search, words)):  # the values that are left out must be valid too
            name = words[0] if verb == "plan" else verb
            check(name, as_typed(name, [word for word in words if "=" in word], sweep=True), sweep=True)
        status = main([verb, *smaller(verb, words)])
        output = capsys.readouterr()
        assert status == 0, f"{verb} {words}: {output.err}"
        if verb == "pretrain" and not run_dir:
            run_dir = re.findall(r"run directory: (\S+)", output.out)[0]
    assert "<h2>Energy</h2>" in Path("runs/energy/report.html").read_text(encoding="utf-8")


# What torch's exporter, Lightning and peft say about torch, transformers and pages of this size.
OTHERS = ("treespec, LeafSpec", "is_gradient_checkpointing", "Position ids", "does not have many workers")


@pytest.mark.usefixtures("registries")
@pytest.mark.filterwarnings(*(f"ignore:.*{text}" for text in OTHERS))
@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "python" for b in blocks(page))], ids=str)
def test_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, one after the other in one scope."""
    monkeypatch.chdir(tmp_path)
    write_files(page)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    scope: dict[str, Any] = module.__dict__
    for block in blocks(page):
        if block.language == "python":
            scope["__file__"] = str(Path(block.file or page).absolute())
            exec(compile(block.code, str(page), "exec", dont_inherit=True), scope)
    if page.name == "engineer.md":
        assert scope["manager"].watch()["itop_rate"] == pytest.approx(0.3, abs=0.02)
        grouped = sum(len(group["params"]) for group in scope["groups"])
        assert grouped == len(list(scope["my_model"].parameters()))


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("**Decoding on Zen 3.**", "results_zen3_decoding.csv"),
        ("**Decoding on an Emerald Rapids Xeon.**", "results_emerald_rapids_decoding.csv"),
    ],
)
def test_a_decoding_table_of_the_kernels_follows_from_the_rows(title: str, name: str) -> None:
    """Each ratio with its quartiles, in italics where it is below its bar."""
    folder, sparsities = ROOT / "experiments" / "kernels", ("0.5", "0.75", "0.9", "0.95")
    with (folder / name).open(newline="") as stream:
        rows = {
            (r["part"], r["tokens"], r["threads"], r["sparsity"], r["contender"]): r for r in csv.DictReader(stream)
        }
    section = (folder / "README.md").read_text().partition(title)[2].partition("\n**Results on ")[0]
    section = section.partition("\n**Decoding on ")[0]
    lines = re.findall(r"^\| (layers|generation), (\d+) \w+ \| (\d) \| (.*) \|$", section, re.M)
    assert len(lines) == 8
    for part, tokens, threads, rest in lines:
        *cells, bars = rest.split(" | ")
        for sparsity, cell, bar in zip_longest(sparsities, cells, bars.rstrip("x").split(" / "), fillvalue=""):
            row = rows["decoding" if part == "layers" else part, tokens, threads, sparsity, "csr"]
            ratio, low, high = (float(row[f"forward_speedup{end}"]) for end in ("", "_low", "_high"))
            missed = bar not in ("", "-", "none") and ratio < float(bar)
            assert cell == f"{'*' * missed}{ratio:.2f}x{'*' * missed} ({low:.2f}-{high:.2f})"


@pytest.mark.parametrize(("host", "name"), [("Zen 4", "results.csv"), ("Emerald Rapids", "results_emerald_rapids.csv")])
def test_the_speeds_of_the_readme_follow_from_the_rows(host: str, name: str) -> None:
    with (ROOT / "experiments" / "kernels" / name).open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["threads"] == "1"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    header, *body = [row.strip("|").split("|") for row in readme.splitlines() if re.match(r"\| (sparsity|\d+ %)", row)]
    titles = [title.strip() for title in header]

    def mean(part: str, contender: str, sparsity: float) -> float:
        found = [row for row in rows if (row["part"], row["contender"]) == (part, contender)]
        return statistics.geometric_mean(float(r["speedup"]) for r in found if float(r["sparsity"]) == sparsity)

    assert len(body) == 4
    for cells in body:
        sparsity = float(cells[0].strip().removesuffix(" %")) / 100
        said = {title: cell.strip().removesuffix("x") for title, cell in zip(titles, cells, strict=True)}
        for title, value in (
            (f"layer, {host}", mean("layer", "csr", sparsity)),
            (f"GPT, {host}", mean("model", "csr", sparsity)),
            (f"dense bfloat16 layer, {host}", mean("layer", "dense_bf16", sparsity)),
        ):
            digits = len(said[title].partition(".")[2])
            assert math.isclose(float(said[title]), value, abs_tol=0.51 * 10**-digits), (title, sparsity, value)
    assert rows[0]["commit"][:7] in readme
