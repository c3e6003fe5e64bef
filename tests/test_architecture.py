"""The structure of the library: the direction of imports, the cost of an import, and forbidden content of files."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest
from fresh import Fresh

import sparsetrain

PACKAGE = Path(sparsetrain.__file__).parent
ROOT = Path(__file__).parents[1]

# Packages and modules in the order of imports: each imports only from itself and from earlier entries. An entry may
# name a subpackage, such as "sparsity.patterns"; a module belongs to the entry that matches most of its name.
ORDER = [
    *(
        "process",
        "errors",
        "flop_formulas",
        "wrappers",
        "seeds",
        "machine",
        "shapes",
        "settings",
        "reading",
        "files",
        "plugins",
        "registry",
        "screen",
        "cache",
        "gradients.record",
        "kernels.simd",
        "kernels",
        "sparsity.patterns",
        "sparsity.evolution.base",
        "sparsity.evolution.rules",
        "sparsity.config",
        "sparsity.backends",
        "sparsity.layers",
        "sparsity.evolution",
        "sparsity",
        "interop.mask_file",
        "gradients.functions",
        "parameterization",
        "models",
        "quantization",
        "gradients",
        "cost",
        *("data.checksums", "data.split", "data.parts", "data.bpe_training", "data.token_sizes", "data.tokenizer_file"),
        *("data.tokenizer_end", "data.tokenizer_formats", "data.tokenizer", "data.tokens"),
        *("data.tables", "data.table_writing", "data.sources", "data.medline", "data.tasks", "data"),
        "optim",
    ),
    *("runs", "vocabulary", "scaling", "training", "report", "stages", "interop", "studies", "bench", "cli", "calls"),
]
MAX_LINES = 400
HEAVY = ("numba", "matplotlib", "hydra", "transformers", "rich", "triton", "jinja2")
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# An absolute path of the author's machine.
PRIVATE_PATH = re.compile(r"(?<![\w.~-])(?:/(?:home|Users|root|work|tmp|mnt|workspace)/[\w.]|[A-Z]:\\\\?Users)")

SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = ["sparsetrain", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def nodes(source: str) -> tuple[ast.AST, ...]:
    """Return the syntax tree as a list, made once for all tests that read a source."""
    return tuple(ast.walk(ast.parse(source)))


def imported(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Yield the line and the absolute name of every import of ``source``, also inside functions.

    ``from a.b import c`` gives ``a.b.c``, because ``c`` may be a module.
    """
    for node in nodes(source):
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


def place(name: str, order: Sequence[str] = ORDER) -> int | None:
    """Return the index of the entry of ``order`` that a name belongs to; None if there is none."""
    parts = name.split(".")[1:]
    entries = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((order.index(entry) for entry in entries if entry in order), None)


def upward_imports(source: str, module: str, is_package: bool = False, order: Sequence[str] = ORDER) -> list[str]:
    """Return the imports of ``module`` from later entries, from the bare package, and from tests or experiments."""
    found = []
    here = place(module, order)
    assert here is not None, f"{module} is in no known part of the library"
    for line, name in imported(source, module, is_package):
        top, _, rest = name.partition(".")
        if top in ("experiments", "tests", "conf"):
            found.append(f"{module}:{line} imports {name}")
        elif top == "sparsetrain" and rest and not rest.startswith("__"):
            there = place(name, order)
            if there is None:
                found.append(f"{module}:{line} imports {name}, which is in no known part")
            elif there > here:
                found.append(f"{module}:{line} imports {name}, from above")
    for node in nodes(source):
        # The bare package may be imported for `__version__` and `__file__`; its other attributes are public names.
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sparsetrain":
            there = place(f"sparsetrain.{node.attr}", order)
            below = there is not None and there <= here
            if not below and not node.attr.startswith("__"):
                found.append(f"{module}:{node.lineno} uses sparsetrain.{node.attr}")
    return found


def import_graph(sources: Mapping[str, tuple[str, bool]]) -> dict[str, set[str]]:
    """Return the modules that each module imports, also for types and inside functions.

    ``from a.b import C`` is an edge to ``a.b`` if ``C`` is no module; a package's own edges then lead to the modules
    from which it imports names. If ``c`` is a module, ``from a.b import c`` is only an edge to ``a.b.c``, although
    Python runs ``a/b/__init__.py`` first.

    Args:
        sources: the text of each module, and whether it is a package, by name.
    """
    graph: dict[str, set[str]] = {}
    for module, (source, is_package) in sources.items():
        graph[module] = set()
        for _, name in imported(source, module, is_package):
            parts = name.split(".")
            prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
            found = next((prefix for prefix in prefixes if prefix in sources), None)
            if found is not None:
                graph[module].add(found)
    return graph


def circle(sources: Mapping[str, tuple[str, bool]]) -> list[str]:
    """Return a circle of modules, in which each imports the next and the first is repeated at the end; else empty."""
    try:
        TopologicalSorter(import_graph(sources)).prepare()
    except CycleError as error:
        return error.args[1][::-1]  # graphlib lists a cycle against its edges
    return []


def pickles(source: str) -> list[str]:
    """Return the uses of pickle, directly or through torch and numpy."""
    found = [
        f"line {line}: {name}"
        for line, name in imported(source, "sparsetrain.any", False)
        if name.split(".")[0] in PICKLES or name in ("torch.load", "torch.save", "numpy.load")
    ]
    for node in nodes(source):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id == "torch" and node.attr in ("load", "save"):
            found.append(f"line {node.lineno}: torch.{node.attr}")
        elif node.attr == "read_pickle":
            found.append(f"line {node.lineno}: read_pickle")
    found += [
        f"line {node.value.lineno}: allow_pickle"
        for node in nodes(source)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
    ]
    return found


def test_imports_point_down() -> None:
    found = []
    for path in SOURCES:
        if path.parent == PACKAGE and path.stem in ("__init__", "__main__"):
            continue  # the public names come from everywhere
        found += upward_imports(path.read_text("utf-8"), module_name(path), path.name == "__init__.py")
    assert found == []


def test_no_files_import_each_other_in_a_circle() -> None:
    sources = {module_name(path): (path.read_text("utf-8"), path.name == "__init__.py") for path in SOURCES}
    del sources["sparsetrain"]  # the public names come from everywhere; what may be used of it is checked above
    assert circle(sources) == []


def test_kernels_do_not_import_torch() -> None:
    found = [
        f"{path.name}:{line} imports {name}"
        for path in (PACKAGE / "kernels").rglob("*.py")
        if not path.name.startswith("triton")
        for line, name in imported(path.read_text("utf-8"), module_name(path), path.name == "__init__.py")
        if name.split(".")[0] in ("torch", "triton")
    ]
    assert found == []


def test_importing_the_library_imports_nothing_heavy(fresh: Fresh) -> None:
    code = (
        "import sys, sparsetrain\n"
        "for name in getattr(sparsetrain, '__all__', []): getattr(sparsetrain, name)\n"
        "print(*sorted({module.split('.')[0] for module in sys.modules}))"
    )
    run = fresh.run(code)
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
        ("import sparsetrain.sparsity.patterns.pattern", False),
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


def test_the_import_check_orders_parts_of_a_part() -> None:
    order = ["ground", "house.cellar", "house", "house.roof"]
    caught = {
        ("house.cellar.wall", "from sparsetrain.ground import Stone"): False,
        ("house.cellar.wall", "from sparsetrain.house.cellar.door import Door"): False,
        ("house.cellar.wall", "from sparsetrain.house import Door"): True,
        ("house.cellar.wall", "from sparsetrain.house.stairs import Step"): True,
        ("house.stairs", "from sparsetrain.house import cellar"): False,
        ("house.stairs", "from sparsetrain.house.roof import Tile"): True,
        ("house.roof", "from sparsetrain.house import Door"): False,
        ("ground", "import sparsetrain.house.cellar.wall"): True,
    }
    found = {
        (module, source): bool(upward_imports(source, f"sparsetrain.{module}", order=order))
        for module, source in caught
    }
    assert found == caught


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"p.a": "from p.b import B", "p.b": "from p.c import C", "p.c": "import torch"}, set()),
        ({"p.a": "import p.b", "p.b": "from p import a"}, {"p.a", "p.b"}),
        ({"p.a": "from .b import B", "p.b": "from . import a"}, {"p.a", "p.b"}),
        ({"p.a": "from p.b import B", "p.b": "def f():\n    from p.a import A"}, {"p.a", "p.b"}),
        ({"p.a": "from p.b import B", "p.b": "if TYPE_CHECKING:\n    from p.a import A"}, {"p.a", "p.b"}),
        ({"p.a": "from p.b import B", "p.b": "from p.c import C", "p.c": "from p import a"}, {"p.a", "p.b", "p.c"}),
        ({"p.q": "from p.q.a import A", "p.q.a": "import p.r", "p.r": "from p.q.b import B", "p.q.b": ""}, set()),
        # The name of another package comes from a file that imports this one; so does a name of one's own package.
        ({"p.q": "from .a import A", "p.q.a": "import p.r", "p.r": "from p.q import A"}, {"p.q", "p.q.a", "p.r"}),
        ({"p.q": "from p.q.a import A", "p.q.a": "from p.q import B"}, {"p.q", "p.q.a"}),
        ({"p.q": "from p.q.a import A", "p.q.a": "from p.q import b", "p.q.b": ""}, set()),
    ],
)
def test_the_check_for_circles_sees_what_it_should(texts: dict[str, str], expected: set[str]) -> None:
    sources = {name: (text, name == "p.q") for name, text in texts.items()}
    found = circle(sources)
    assert set(found) == expected
    graph = import_graph(sources)
    assert all(there in graph[here] for here, there in pairwise(found))
    assert not found or found[0] == found[-1]


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
