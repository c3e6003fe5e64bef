"""Where a tokenizer of the user's is read from: a file, a Hugging Face directory, or a name; always as one file.

Each kind becomes the content of a ``tokenizer.json``, of which a run keeps a copy. So nothing but the `tokenizers`
library is needed to use the run.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sparsetrain.data.tokenizer_formats.sentencepiece import from_sentencepiece
from sparsetrain.data.tokenizer_formats.tiktoken import TIKTOKEN_NAMES, from_tiktoken, from_tiktoken_name
from sparsetrain.data.tokenizer_formats.wordpiece import from_bpe_files, from_word_pieces
from sparsetrain.errors import UserError, nearest
from sparsetrain.files import typed_path
from sparsetrain.reading import decode, parse_json, read_bytes, read_json

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "merges.txt")
_SUFFIXES = (".json", ".model", ".tiktoken", ".txt")


class Found(NamedTuple):
    """The content of a ``tokenizer.json``, and the token that ends a document if it is named."""

    content: bytes
    eos_token: str | None


def read_tokenizer(path: str | Path, eos_token: str | None = None) -> Found:
    """Return the tokenizer at ``path``.

    - A file: a ``tokenizer.json``; a SentencePiece ``.model``; a ``.tiktoken``, or a ``.model`` with its lines; a
      ``vocab.txt`` of WordPiece.
    - A directory, such as one of Hugging Face, with ``tokenizer.json``, or else ``tokenizer.model``, ``vocab.txt``, or
      ``vocab.json`` with ``merges.txt``. Its configuration names the end of a document.
    - ``OWNER/NAME`` on the Hugging Face hub, which needs the extra ``hf``.
    - An encoding of `tiktoken`, such as ``o200k_base``, which needs that package.

    Args:
        path: the place or name. What exists as a file or directory is not looked up as a name.
        eos_token: the token that ends a document, which goes before what a directory names.

    Raises:
        UserError: there is no such tokenizer, or it cannot be read.
    """
    where = f"data.tokenizer_path={path}"
    place = typed_path(path, "data.tokenizer_path")
    if place.is_dir():
        return _of_directory(place, where, eos_token)
    if place.is_file():
        return Found(_of_file(place, where, {}), eos_token)
    name = str(path)
    if name in TIKTOKEN_NAMES:
        return Found(from_tiktoken_name(name, where), eos_token)
    if not _NAME.fullmatch(name) or place.suffix in _SUFFIXES or place.parent.is_dir():
        known = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
        raise UserError(f"{where}: no such file{nearest(place.name, known)}")
    return _of_directory(_of_hub(name), where, eos_token)


def _of_file(place: Path, where: str, config: Mapping[str, Any]) -> bytes:
    content = read_bytes(place)
    if not content:
        raise UserError(f"{where}: the file {place.name} is empty")
    if place.suffix == ".tiktoken" or (place.suffix == ".model" and re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content)):
        return from_tiktoken(content, place.stem, where)
    if place.suffix == ".model" or ".model." in place.name:
        return from_sentencepiece(content, where)
    if place.suffix == ".txt":
        return from_word_pieces(decode(content, where), config, where)
    return content


def _of_directory(place: Path, where: str, eos_token: str | None) -> Found:
    configs = {name: read_json(place / name, dict) for name in _CONFIGS if (place / name).is_file()}
    config = configs.get("tokenizer_config.json", {})
    named = eos_token or _end_of_directory(configs)
    if (place / "tokenizer.json").is_file():
        content = _of_file(place / "tokenizer.json", where, config)
        return Found(content, eos_token or _known(named or _end_by_id(configs, content), content))
    if (place / "tokenizer.model").is_file():
        content = _of_file(place / "tokenizer.model", where, config)
    elif (place / "vocab.txt").is_file():
        content = _of_file(place / "vocab.txt", where, config)
    elif (place / "vocab.json").is_file() and (place / "merges.txt").is_file():
        content = from_bpe_files(place / "vocab.json", place / "merges.txt", config, where)
    else:
        raise UserError(f"{where}: no such file in this directory: it has none of {', '.join(_FILES)}")
    return Found(content, eos_token or _known(named, content))


def _end_of_directory(configs: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the token that the files of a directory call ``eos_token``."""
    for name in _CONFIGS[:2]:
        token = configs.get(name, {}).get("eos_token")
        if isinstance(token, dict):  # an added token with its settings
            token = token.get("content")
        if isinstance(token, str) and token:
            return token
    return None


def _end_by_id(configs: Mapping[str, Mapping[str, Any]], content: bytes) -> str | None:
    """Return the token with the id that ``generation_config.json`` gives, of several the first."""
    index = configs.get(_CONFIGS[2], {}).get("eos_token_id")
    if isinstance(index, list):
        index = index[0] if index else None
    added = [token for token in _layout(content).get("added_tokens") or [] if isinstance(token, dict)]
    return next((token.get("content") for token in added if index is not None and token.get("id") == index), None)


def _known(name: str | None, content: bytes) -> str | None:
    """Return the name if the file has this token; a configuration may name one that its vocabulary lacks."""
    layout = _layout(content)
    vocabulary = layout.get("model", {}).get("vocab") if isinstance(layout.get("model"), dict) else None
    if name is None or vocabulary is None:
        return None
    pieces = vocabulary if isinstance(vocabulary, dict) else {piece[0] for piece in vocabulary}
    added = {token.get("content") for token in layout.get("added_tokens") or [] if isinstance(token, dict)}
    return name if name in added or name in pieces else None


@functools.lru_cache(maxsize=4)
def _layout(content: bytes) -> dict[str, Any]:
    try:
        found: dict[str, Any] = parse_json(content, "it", dict, finite=False)
    except UserError:
        return {}  # `Tokenizer` says what is wrong with the file
    return found


@functools.lru_cache(maxsize=8)
def _of_hub(name: str) -> Path:
    """Return the directory into which the files of a tokenizer on the Hugging Face hub were downloaded."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"data.tokenizer_path={name}: no such file; a tokenizer of the Hugging Face hub needs huggingface_hub: pip "
            "install 'sparsetrain[hf]'"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*_FILES, *_CONFIGS]))
    except Exception as error:  # its own errors, those of its HTTP client, and those of the file system
        reason = (str(error).strip().splitlines() or [""])[0][:150]
        raise UserError(
            f"data.tokenizer_path={name}: no such file, and the Hugging Face hub does not give it "
            f"({type(error).__name__}: {reason})"
        ) from None
