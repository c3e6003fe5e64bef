"""Checkpoints: written completely or not at all, and verified before use.

    checkpoints/
        latest                   name of the newest complete checkpoint, one line
        step-00000100/
            model.safetensors
            optimizer.safetensors
            state.json           state of the run, groups of the optimizer, names that share a tensor
            manifest.json        step, size and SHA-256 of each file, and a digest of the manifest itself

A checkpoint is written into a hidden directory next to its final place, flushed to disk, and renamed. Whatever
interrupts a save, the directory holds either the previous newest checkpoint or the new one, complete. Only one process
may save into a directory; any number may read from it at the same time.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from sparsetrain.errors import UserError, nearest
from sparsetrain.files import flush
from sparsetrain.reading import parse_json
from sparsetrain.runs.manifest import (
    RefusedError,
    canonical,
    read_file,
    read_manifest,
    seal,
    write_durably,
)
from sparsetrain.runs.optimizer_state import JSON, OptimizerTensors, optimizer_tensors, restore_optimizer

__all__ = [
    "JSON",
    "Checkpoint",
    "OptimizerTensors",
    "checkpoint_name",
    "clear_leftovers",
    "list_checkpoints",
    "load_checkpoint",
    "optimizer_tensors",
    "restore_optimizer",
    "save_checkpoint",
    "verify_checkpoint",
]

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_log = logging.getLogger(__name__)

LATEST = "latest"

_CONTENTS = (MODEL, OPTIMIZER, STATE)
_NAME = re.compile(r"step-([0-9]{8,})")
# Prefixes of hidden directories: a checkpoint being written, the old one that it replaces, one being deleted.
_WRITING, _REPLACED, _REMOVING = ".writing-", ".replaced-", ".removing-"
_POINTER = ".latest"  # the new ``latest`` before it is renamed


class _Document(TypedDict):
    state: dict[str, Any]
    optimizer: list[dict[str, Any]]
    aliases: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint; all tensors are on the CPU.

    Attributes:
        step: number of optimizer steps done.
        model: the model's state dict; names that shared a tensor when saved share one here.
        optimizer: argument for `restore_optimizer`.
        state: the run's own state.
        path: the directory that it was read from.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: OptimizerTensors
    state: dict[str, JSON]
    path: Path


def checkpoint_name(step: int) -> str:
    """Return the directory name of the checkpoint after ``step`` steps, e.g. ``step-00000100``."""
    if step < 0:
        raise ValueError(f"step={step} must be at least 0")
    return f"step-{step:08d}"


def _step(name: str) -> int | None:
    """Return the step in a directory name, or None if it is not the name of a checkpoint."""
    match = _NAME.fullmatch(name)
    step = int(match[1]) if match else None
    return step if step is not None and name == checkpoint_name(step) else None


# ----------------------------------------------------------------------------------------------------- writing


def _without_duplicates(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return contiguous tensors that share no memory, and ``{omitted name: kept name}`` for tied tensors."""
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple[Any, ...], str] = {}
    storages: set[tuple[Any, int]] = set()
    for name, tensor in tensors.items():
        if tensor.numel() == 0:  # it has no memory to share
            kept[name] = tensor.detach().contiguous()
            continue
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        view = (*storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if view in first_name:
            aliases[name] = first_name[view]
            continue
        first_name[view] = name
        dense = tensor.detach().contiguous()
        # Different views of one storage, e.g. the rows of a fused matrix, become separate tensors.
        shares = storage in storages and dense.untyped_storage().data_ptr() == storage[1]
        kept[name] = dense.clone() if shares else dense
        storages.add(storage)
    return kept, aliases


def _remove(path: Path) -> None:
    """Delete a checkpoint directory; a rename first makes it disappear at once."""
    hidden = path.with_name(_REMOVING + path.name)
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def clear_leftovers(directory: Path) -> None:
    """Clean up after an interrupted save in a ``checkpoints`` directory; no other process may be writing to it."""
    if not directory.is_dir():
        return
    (directory / _POINTER).unlink(missing_ok=True)
    for path in sorted(directory.iterdir()):
        if path.name.startswith(_REPLACED):
            original = directory / path.name.removeprefix(_REPLACED)
            if original.exists():
                shutil.rmtree(path)
            else:
                os.rename(path, original)
        elif path.name.startswith((_WRITING, _REMOVING)):
            shutil.rmtree(path)


def _publish(working: Path, final: Path) -> None:
    """Rename a finished directory to its final name and point ``latest`` to it, flushing both to disk."""
    directory = final.parent
    pointer, replaced = directory / _POINTER, directory / (_REPLACED + final.name)
    write_durably(pointer, f"{final.name}\n".encode())  # first, because this may need disk space and renaming does not
    if final.exists():
        # Two renames are not atomic. Between them a reader uses the replaced directory instead of the missing one.
        os.rename(final, replaced)
    os.rename(working, final)
    flush(directory)
    os.replace(pointer, directory / LATEST)
    flush(directory)
    if replaced.exists():
        shutil.rmtree(replaced)


def _discard(directory: Path, working: Path) -> None:
    """Remove the files of a failed save, ignoring errors."""
    shutil.rmtree(working, ignore_errors=True)
    with contextlib.suppress(OSError):
        (directory / _POINTER).unlink(missing_ok=True)


@contextlib.contextmanager
def _reporting(name: str, directory: Path, working: Path) -> Iterator[None]:
    """Turn an error of the file system into a `UserError` of one line, and remove the unfinished directory."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        _discard(directory, working)
        text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        full = text == os.strerror(errno.ENOSPC) or os.strerror(errno.ENOSPC) in text
        advice = "free some space there" if full else "check that the directory can be written"
        raise UserError(
            f"checkpoint {name} could not be saved in {directory}: {text}; {advice} or choose another run_dir, "
            "then resume from the previous checkpoint"
        ) from error
    except BaseException:
        _discard(directory, working)
        raise


def save_checkpoint(
    directory: Path,
    step: int,
    model_state: Mapping[str, Tensor],
    optimizer_state: OptimizerTensors,
    state: Mapping[str, JSON],
    keep_last: int,
) -> Path:
    """Write the checkpoint of ``step`` and return its path once it is on disk.

    Tensors may be on any device, non-contiguous, tied, or views of one storage. An existing checkpoint of the same step
    is replaced. Once the new one is complete, older checkpoints are removed, except for the newest ``keep_last - 1``.
    Checkpoints of later steps, which exist if the run was restarted from an older one, are kept.

    Args:
        directory: the run's ``checkpoints`` directory, created if absent.
        step: number of optimizer steps done.
        model_state: ``model.state_dict()``.
        optimizer_state: from `optimizer_tensors`.
        state: any JSON value; object keys must be strings.
        keep_last: number of checkpoints to keep, including this one; at least 1.

    Raises:
        UserError: the disk is full or the directory is not writable; earlier checkpoints are unchanged.
        TypeError: ``state`` holds something that JSON cannot represent.
    """
    if keep_last < 1:
        raise UserError(f"keep_last={keep_last} must be at least 1")
    name = checkpoint_name(step)
    model, model_aliases = _without_duplicates(model_state)
    optimizer, optimizer_aliases = _without_duplicates(optimizer_state.tensors)
    aliases = {MODEL: model_aliases, OPTIMIZER: optimizer_aliases}
    document = canonical({"state": dict(state), "optimizer": optimizer_state.groups, "aliases": aliases})

    directory = Path(directory)
    working, final = directory / (_WRITING + name), directory / name
    with _reporting(name, directory, working):
        if not directory.is_dir():
            directory.mkdir(parents=True)
            flush(directory.parent)
        clear_leftovers(directory)
        working.mkdir()
        safetensors.torch.save_file(model, working / MODEL)
        safetensors.torch.save_file(optimizer, working / OPTIMIZER)
        (working / STATE).write_bytes(document)
        seal(working, step, _CONTENTS)
        _publish(working, final)
        older = [other for other in list_checkpoints(directory) if (_step(other) or 0) < step]
        for other in older[: max(len(older) - (keep_last - 1), 0)]:
            _remove(directory / other)
    return final


# ----------------------------------------------------------------------------------------------------- reading


def list_checkpoints(directory: Path) -> list[str]:
    """Return the names of the checkpoints in ``directory``, oldest first, including damaged ones."""
    try:
        entries = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = {entry.removeprefix(_REPLACED) for entry in entries}
    steps = {name: step for name in names if (step := _step(name)) is not None}
    return sorted(steps, key=lambda name: steps[name])


def _latest(directory: Path) -> str | None:
    """Return the name in ``latest``, or None if the file is absent or holds no checkpoint name."""
    try:
        name = (directory / LATEST).read_bytes().decode("ascii").removesuffix("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return name if _step(name) is not None else None


def _read_verified(path: Path, step: int) -> Checkpoint:
    """Read a checkpoint. Each file is read only once, so that the bytes used are the bytes verified."""
    manifest = read_manifest(path, step)
    content = read_file(path, STATE, manifest)
    try:
        document = parse_json(content, STATE, _Document, finite=False)
    except UserError as error:
        raise RefusedError(str(error)) from None
    tensors: dict[str, dict[str, Tensor]] = {}
    for file in (MODEL, OPTIMIZER):
        try:
            tensors[file] = safetensors.torch.load(read_file(path, file, manifest))
            for alias, kept in document["aliases"].get(file, {}).items():
                tensors[file][alias] = tensors[file][kept]
        except (SafetensorError, ValueError, LookupError, RuntimeError, TypeError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RefusedError(f"{file} cannot be read: {reason[:200]}") from None
    optimizer = OptimizerTensors(tensors[OPTIMIZER], document["optimizer"])
    return Checkpoint(step, tensors[MODEL], optimizer, document["state"], path)


class _VanishedError(RefusedError):
    """The run that writes the directory has removed the checkpoint in the meantime."""


def _find(directory: Path, name: str) -> tuple[Path, tuple[int, int] | None]:
    """Return the path of a checkpoint and a key that changes if another checkpoint takes its place."""
    path, replaced = directory / name, directory / (_REPLACED + name)
    # The last try covers a replacement that was completed between the first two.
    for place in (path, replaced, path):
        with contextlib.suppress(OSError):
            status = place.stat()
            return place, (status.st_ino, status.st_mtime_ns)
    return path, None


def _read_current(directory: Path, name: str) -> Checkpoint:
    """Read a checkpoint, and read it again if it was moved or replaced during the read."""
    step = _step(name)
    assert step is not None  # names come from list_checkpoints
    while True:
        found = _find(directory, name)
        try:
            return _read_verified(found[0], step)
        except RefusedError:
            now = _find(directory, name)
            if now[1] is None:
                raise _VanishedError("it no longer exists") from None
            if now == found:
                raise


def verify_checkpoint(path: Path) -> None:
    """Compare every byte of the checkpoint at ``path`` with its manifest.

    Raises:
        UserError: it is damaged or incomplete, or its name is not a checkpoint name; the message gives name and reason.
    """
    path = Path(path)
    step = _step(path.name)
    if step is None:
        raise UserError(f"checkpoint {path} refused: its name is not like {checkpoint_name(100)}")
    try:
        manifest = read_manifest(path, step)
        for file in _CONTENTS:
            read_file(path, file, manifest)
    except RefusedError as error:
        raise UserError(f"checkpoint {path.name} refused: {error}") from None


def load_checkpoint(directory: Path, name: str | None = None) -> Checkpoint:
    """Return the newest usable checkpoint of ``directory``, or the one called ``name``.

    ``latest`` names the newest one; if the named one does not exist, the highest step counts. If a checkpoint is
    damaged, a warning is logged and the one before it is tried. Peak memory is about twice the size of the checkpoint.

    Args:
        directory: a run's ``checkpoints`` directory.
        name: e.g. ``step-00000100``.

    Raises:
        UserError: no checkpoint is usable, or the one called ``name`` is absent or damaged.
    """
    directory = Path(directory)
    if name is not None:
        present = list_checkpoints(directory)
        if name not in present:
            raise UserError(
                f"checkpoint={name!r} is not in {directory}, which has {', '.join(present) or 'none'}"
                + nearest(name, present)
            )
        try:
            return _read_current(directory, name)
        except RefusedError as error:
            raise UserError(f"checkpoint {name} refused: {error}") from None

    refused: list[str] = []
    tried: set[str] = set()
    # List again for each attempt: the run that writes the directory may remove checkpoints meanwhile.
    while candidates := [other for other in list_checkpoints(directory) if other not in tried]:
        latest = _latest(directory)
        chosen = latest if latest in candidates else candidates[-1]
        tried.add(chosen)
        try:
            return _read_current(directory, chosen)
        except _VanishedError:
            continue
        except RefusedError as error:
            refused.append(f"{chosen} refused: {error}")
            _log.warning("checkpoint %s", refused[-1])
    reasons = f" that can be used ({'; '.join(refused)})" if refused else ""
    raise UserError(f"{directory} has no checkpoint{reasons}")
