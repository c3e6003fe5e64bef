"""The token that ends a document: found in a ``tokenizer.json``, or named by the user and then marked in the file.

The mark is a field of the token's entry among the ``added_tokens``. The `tokenizers` library ignores it, so the file
works elsewhere too, and the copy in a run directory names its own end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sparsetrain.errors import UserError, nearest

END_OF_TEXT = "<|endoftext|>"
# Names that common tokenizers give to the token that ends a document.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
MARK = "ends_document"
_SHOWN = 8  # names of special tokens in an error


def end_of(layout: Mapping[str, Any]) -> str | None:
    """Return the token that ends a document: the marked one, or the first usual name among the special tokens."""
    special = [token for token in layout.get("added_tokens") or [] if token.get("special")]
    marked = [token["content"] for token in special if token.get(MARK) is True]
    names = {token["content"] for token in special}
    return next(iter(marked), None) or next((name for name in END_NAMES if name in names), None)


def with_end(layout: Mapping[str, Any], name: str, vocabulary: Mapping[str, int], where: str) -> bytes | None:
    """Return the content of a ``tokenizer.json`` in which the token ``name`` ends a document; None if it does already.

    Args:
        layout: the content of the file.
        name: a token of the vocabulary. It becomes a special token.
        vocabulary: the id of each token, added ones included.
        where: begins the line of an error.

    Raises:
        UserError: there is no such token.
    """
    if end_of(layout) == name:
        return None
    if name not in vocabulary:
        raise UserError(
            f"data.eos_token={name!r:.60} is no token of {where}{nearest(name, specials(layout))}; {_listed(layout)}"
        )
    tokens = [{key: token[key] for key in token if key != MARK} for token in layout.get("added_tokens") or []]
    if not any(token["content"] == name for token in tokens):
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokens.append({"id": vocabulary[name], "content": name, **plain})
        tokens.sort(key=lambda token: token["id"])
    tokens = [{**token, "special": True, MARK: True} if token["content"] == name else token for token in tokens]
    return json.dumps({**layout, "added_tokens": tokens}, ensure_ascii=False, indent=2).encode()


def no_end(layout: Mapping[str, Any], where: str) -> UserError:
    """Return the error of a file that names no end."""
    names = ", ".join(END_NAMES)
    return UserError(
        f"{where}: no token that ends a document; looked for the special tokens {names}; name one of its tokens with "
        f"data.eos_token ({_listed(layout)})"
    )


def specials(layout: Mapping[str, Any]) -> list[str]:
    """Return the names of the special tokens."""
    return [token["content"] for token in layout.get("added_tokens") or [] if token.get("special")]


def _listed(layout: Mapping[str, Any]) -> str:
    names = specials(layout)
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:_SHOWN])
    return f"its special tokens are {shown}{', …' if len(names) > _SHOWN else ''}" if names else "it has no special one"
