"""The shape of the library: which way imports point, what an import costs, and what no file may contain."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparsetrain

PACKAGE = Path(sparsetrain.__file__).parent
ROOT = Path(__file__).parents[1]

# The house, ground floor first: a part imports from itself and from the parts before it.
ORDER = [
    *(
        "process",
        "errors",
        "wrappers",
        "seeds",
        "processor",
        "shapes",
        "reading",
        "files",
        "screen",
        "cache",
        "kernels",
        "sparsity",
        "parameterization",
        "models",
        "cost",
        "data",
        "optim",
    ),
    *("runs", "training", "scaling", "report", "stages", "bench"),
    *("overrides", "inherited", "config", "verbs", "multirun", "cli"),
]
MAX_LINES = 400
HEAVY = ("numba", "matplotlib", "hydra", "transformers", "rich", "triton")
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# A path on the machine of whoever wrote it.
PRIVATE_PATH = re.compile(r"(?<![\w.~-])(?:/(?:home|Users|root|work|tmp|mnt|workspace)/[\w.]|[A-Z]:\\\\?Users)")

SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = ["sparsetrain", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield the line and the absolute name of all that ``source`` imports, inside functions too.

    ``from a.b import c`` gives ``a.b.c``, because ``c`` may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base]) if base else ".".join(parents)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def upward_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return what ``module`` imports from the parts above it, from the top or from outside the library."""
    found = []
    here = module.split(".")[1]
    for line, name in imported(source, module, is_package):
        top, _, rest = name.partition(".")
        part = rest.split(".")[0]
        if top in ("experiments", "tests", "conf"):
            found.append(f"{module}:{line} imports {name}")
        elif top == "sparsetrain" and part and not part.startswith("__"):
            if part not in ORDER:
                found.append(f"{module}:{line} imports {name}, which is in no known part")
            elif ORDER.index(part) > ORDER.index(here):
                found.append(f"{module}:{line} imports {name}, from above")
    for node in ast.walk(ast.parse(source)):
        # The bare package may be imported for `__version__` and `__file__`; its other attributes are public names.
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sparsetrain":
            below = node.attr in ORDER and ORDER.index(node.attr) <= ORDER.index(here)
            if not below and not node.attr.startswith("__"):
                found.append(f"{module}:{node.lineno} uses sparsetrain.{node.attr}")
    return found


def pickles(source: str) -> list[str]:
    """Return the uses of pickle, directly or through torch and numpy."""
    found = [
        f"line {line}: {name}"
        for line, name in imported(source, "sparsetrain.any", False)
        if name.split(".")[0] in PICKLES or name in ("torch.load", "torch.save", "numpy.load")
    ]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id == "torch" and node.attr in ("load", "save"):
            found.append(f"line {node.lineno}: torch.{node.attr}")
        elif node.attr == "read_pickle":
            found.append(f"line {node.lineno}: read_pickle")
    found += [
        f"line {node.value.lineno}: allow_pickle"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
    ]
    return found


def test_imports_point_down() -> None:
    found = []
    for path in SOURCES:
        if path.parent == PACKAGE and path.stem in ("__init__", "__main__"):
            continue  # the public names come from everywhere
        module = module_name(path)
        assert module.split(".")[1] in ORDER, f"{module} is in no known part of the library"
        found += upward_imports(path.read_text("utf-8"), module, path.name == "__init__.py")
    assert found == []


def test_kernels_do_not_import_torch() -> None:
    found = [
        f"{path.name}:{line} imports {name}"
        for path in (PACKAGE / "kernels").rglob("*.py")
        if not path.name.startswith("triton")
        for line, name in imported(path.read_text("utf-8"), module_name(path), path.name == "__init__.py")
        if name.split(".")[0] in ("torch", "triton")
    ]
    assert found == []


def test_importing_the_library_imports_nothing_heavy() -> None:
    code = (
        "import sys, sparsetrain\n"
        "for name in getattr(sparsetrain, '__all__', []): getattr(sparsetrain, name)\n"
        "print(*sorted({module.split('.')[0] for module in sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    loaded = set(run.stdout.split())
    assert "sparsetrain" in loaded
    assert loaded.isdisjoint(HEAVY), f"import sparsetrain also imports {sorted(loaded & set(HEAVY))}"


def test_nothing_is_read_or_written_through_pickle() -> None:
    found = {str(path.relative_to(PACKAGE)): uses for path in SOURCES if (uses := pickles(path.read_text("utf-8")))}
    assert found == {}


def test_every_file_is_one_idea_long() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def project_files() -> Iterator[Path]:
    folders = [PACKAGE, *(ROOT / name for name in ("conf", "experiments", "tests"))]
    for folder in folders:
        yield from (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    yield from (path for path in ROOT.iterdir() if path.suffix in (".md", ".toml", ".txt") or path.name == "Makefile")


def test_no_file_holds_a_path_of_one_machine() -> None:
    found = []
    for path in project_files():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # an image
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in PRIVATE_PATH.finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        ("from sparsetrain.errors import UserError", False),
        ("from sparsetrain import __version__", False),
        ("import sparsetrain.sparsity.pattern", False),
        ("from sparsetrain.models import config", False),
        ("from .config import ModelConfig", False),
        ("from ..sparsity import SparseLinear", False),
        ("import torch", False),
        ("from ..training import loop", True),
        ("from sparsetrain import training", True),
        ("import sparsetrain\nprint(sparsetrain.__version__)", False),
        ("import sparsetrain\nsparsetrain.MaskManager", True),
        ("def f():\n    from sparsetrain.cli import main", True),
        ("from experiments import anything", True),
        ("from sparsetrain.attic import old", True),
    ],
)
def test_the_import_check_sees_what_it_should(source: str, caught: bool) -> None:
    assert bool(upward_imports(source, "sparsetrain.models.transformer")) == caught


def test_the_import_check_resolves_relative_names_in_a_package() -> None:
    assert upward_imports("from .config import ModelConfig", "sparsetrain.models", is_package=True) == []
    assert upward_imports("from ..training import loop", "sparsetrain.models", is_package=True) != []


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        ("json.load(file); np.load(path); np.load(path, allow_pickle=False)", False),
        ("safetensors.torch.load(content)", False),
        ("import pickle", True),
        ("from joblib import dump", True),
        ("torch.load(path, weights_only=True)", True),
        ("from torch import load", True),
        ("read = torch.load", True),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path, allow_pickle=flag)", True),
    ],
)
def test_the_pickle_check_sees_what_it_should(source: str, caught: bool) -> None:
    assert bool(pickles(source)) == caught


@pytest.mark.parametrize(
    ("parts", "caught"),
    [
        (("", "home", "me", "data"), True),
        (('path = "', "Users", "me"), True),
        (("https://example.org", "home", "page"), False),
        (("tmp_path", "work", "x"), False),
        (("~", "work", "x"), False),
    ],
)
def test_the_path_check_sees_what_it_should(parts: tuple[str, ...], caught: bool) -> None:
    assert bool(PRIVATE_PATH.search("/".join(parts))) == caught
