"""The provenance of numbers: the commit of the source, the machine, and the command."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import sparsetrain
from sparsetrain.machine import core_count, processor


def commit() -> str | None:
    """Return the git commit of the source tree that the package runs from, with ``+`` if files were changed."""
    root = Path(sparsetrain.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def machine(device: torch.device) -> dict[str, Any]:
    """Return a description of the machine and the library versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparsetrain": sparsetrain.__version__,
    }


def _processor() -> str:
    return f"{processor().label}, {core_count()} cores"


def command_line() -> str:
    """Return the command that started this process, in shell syntax."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
