"""The built wheel: its content, and its use without the source."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from fresh import Fresh

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel, unpacked."""
    home = tmp_path_factory.mktemp("wheel")
    source = home / "source"
    source.mkdir()
    for name in ("sparsetrain", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(home / "dist")],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (wheel,) = (home / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(home / "site")
    return home / "site"


def test_the_wheel_holds_the_configurations_and_the_data_files(unpacked: Path) -> None:
    for tree in ("sparsetrain", "conf"):
        base = unpacked / "sparsetrain" / ("conf" if tree == "conf" else "")
        for path in (ROOT / tree).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                copied = base / path.relative_to(ROOT / tree)
                assert copied.read_bytes() == path.read_bytes()
    (metadata,) = unpacked.glob("*.dist-info")
    assert "sparsetrain = sparsetrain.cli:main" in (metadata / "entry_points.txt").read_text()
    assert not (unpacked / "tests").exists()


def test_the_wheel_works_from_another_directory(fresh: Fresh, unpacked: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import sparsetrain, sparsetrain.cli\n"
        "assert sparsetrain.__file__.startswith(sys.argv[1]), sparsetrain.__file__\n"
        "assert sparsetrain.cli.main(['--help']) == 0\n"
        "from sparsetrain.cli.compose import config_directory\n"
        "from sparsetrain.cli.resolve import load\n"
        "assert str(config_directory()).startswith(sys.argv[1])\n"
        "assert [arm.name for arm in load('pipeline', ['experiment=demo']).arms] == ['dense', 'sparse-0.75']\n"
    )
    done = fresh.run(script, str(unpacked), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sparsetrain VERB" in done.stdout
