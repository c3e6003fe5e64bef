"""``import sparsetrain`` opens no file of the user's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fresh import Fresh

import sparsetrain
from sparsetrain.machine import machine_key

# An audit hook (PEP 578) sees every file that the process opens from Python.
_IMPORT = """
import sys

opened = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)
import sparsetrain

print(*sorted({path for path in opened if not path.isdigit()}), sep="\\n")
"""

_USE = """
import logging

said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
logging.getLogger("sparsetrain").addHandler(handler)

import sparsetrain, torch

layer = sparsetrain.SparseLinear(64, 64, density=0.5, seed=0)
print(len(said))
layer(torch.zeros(8, 64))
layer(torch.zeros(8, 64))
print(*said, sep="\\n")
"""


def run(fresh: Fresh, code: str, folder: Path) -> str:
    plugin = folder / "plugin.py"  # loaded only for an unknown name, and all names here are known
    plugin.write_text("raise RuntimeError('a plugin was loaded')")
    env = os.environ | {
        "HOME": str(folder),
        "SPARSETRAIN_CACHE": str(folder / "cache"),
        "SPARSETRAIN_PLUGINS": str(plugin),
    }
    done = fresh.run(code, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_import_opens_no_file_of_the_users(fresh: Fresh, tmp_path: Path) -> None:
    opened = [Path(line) for line in run(fresh, _IMPORT, tmp_path).splitlines()]
    own = Path(sparsetrain.__file__).parent
    # Where a compiled form exists, Python opens that alone, and it may lie elsewhere.
    assert any(path.name.startswith("registry.") and own.name in path.parts for path in opened)
    compiled = [Path(sys.pycache_prefix)] if sys.pycache_prefix else []
    allowed = [own, *compiled, *(Path(path) for path in (sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev"))]
    # An editable install adds a finder, which lies in site-packages and so below the prefix.
    assert [path for path in opened if not any(path.is_relative_to(place) for place in allowed)] == []


def test_a_damaged_crossover_table_is_warned_of_at_the_first_use_of_auto(fresh: Fresh, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    table = tmp_path / "cache" / f"crossover-{machine_key()}.json"
    table.write_text('{"backends": {')
    at_import, *at_use = run(fresh, _USE, tmp_path).splitlines()
    assert at_import == "0"
    assert len(at_use) == 1
    assert str(table) in at_use[0]
