"""SentencePiece models (``.model``): Unigram and BPE, with byte fallback, a space before texts, and normalization."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from sparsetrain.data.tokenizer_end import with_end
from sparsetrain.data.tokenizer_file import library_errors
from sparsetrain.data.tokenizer_formats.protobuf import Value, fields
from sparsetrain.errors import UserError

SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4  # types of a piece
_UNIGRAM, _BPE = 1, 2


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


@dataclass
class _Model:
    """What is needed of a model's file; the defaults are those of SentencePiece."""

    pieces: list[_Piece] = field(default_factory=list)
    kind: int = _UNIGRAM
    byte_fallback: bool = False
    end: int = 2
    characters: bytes = b""  # the compiled map of a normalization
    prefix: bool = True
    collapse: bool = True  # several spaces become one, and those at the ends are dropped


def from_sentencepiece(content: bytes, where: str) -> bytes:
    """Return the content of a ``tokenizer.json`` for the bytes of a SentencePiece model.

    Raises:
        UserError: it is none, or its model is neither Unigram nor BPE; the line begins with ``where``.
    """
    try:
        model = _read(content)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: not a SentencePiece model ({error})") from None
    if not model.pieces:
        raise UserError(f"{where}: not a SentencePiece model (it has no pieces)")
    if model.kind not in (_UNIGRAM, _BPE):
        raise UserError(f"{where}: a SentencePiece model of words or characters; allowed are unigram and bpe")
    with library_errors(f"{where}: not a SentencePiece model"):
        inner = _library(model)
        made: str = inner.to_str(pretty=True)
    if 0 <= model.end < len(model.pieces) and model.pieces[model.end].kind == _CONTROL:
        marked = with_end(json.loads(made), model.pieces[model.end].text, inner.get_vocab(True), where)
        return made.encode() if marked is None else marked
    return made.encode()


def _read(content: bytes) -> _Model:
    found = _Model()
    for number, value in fields(content):
        if number == 1:
            piece: Mapping[int, Any] = dict(fields(_message(value)))
            found.pieces.append(_Piece(piece[1].decode(), float(piece.get(2, 0.0)), piece.get(3, _NORMAL)))
        elif number == 2:  # of the trainer
            given: Mapping[int, Any] = dict(fields(_message(value)))
            found.kind, found.byte_fallback = given.get(3, _UNIGRAM), bool(given.get(35, 0))
            found.end = given.get(42, 2)
            if given.get(24, 0):
                raise ValueError("it writes white space behind words")
        elif number == 3:  # of the normalizer
            given = dict(fields(_message(value)))
            found.characters = bytes(given.get(2, b""))
            found.prefix, found.collapse = bool(given.get(3, 1)), bool(given.get(4, 1))
            if not given.get(5, 1):
                raise ValueError("it does not escape white space")
    return found


def _message(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a message should be")
    return value


def _library(model: _Model) -> tokenizers.Tokenizer:
    pieces = model.pieces
    unknown = next((index for index, piece in enumerate(pieces) if piece.kind == _UNKNOWN), None)
    if model.kind == _UNIGRAM:
        scored = [(piece.text, piece.score) for piece in pieces]
        inner = tokenizers.Tokenizer(models.Unigram(scored, unknown, model.byte_fallback))
    else:
        inner = tokenizers.Tokenizer(
            models.BPE(
                vocab={piece.text: index for index, piece in enumerate(pieces)},
                merges=merges_of([piece.text for piece in pieces], _ranks(pieces)),
                unk_token=None if unknown is None else pieces[unknown].text,
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
            )
        )
    own = [piece.text for piece in pieces if piece.kind == _USER]
    steps: list[Any] = [normalizers.Precompiled(model.characters)] if model.characters else []
    if model.collapse:
        # The text between symbols of the user's is normalized part by part, and keeps the spaces at their sides.
        steps += [] if own else [normalizers.Strip()]
        steps.append(normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    if not own:
        # As SentencePiece does it, also before a text that begins with a space.
        steps += [normalizers.Prepend(SPACE)] if model.prefix else []
        steps.append(normalizers.Replace(" ", SPACE))
    inner.normalizer = normalizers.Sequence(steps)
    # A piece with an inner space, such as one of several spaces, must not be cut.
    split = not any(SPACE in piece.text[1:] for piece in pieces)
    # The text between symbols of the user's would get a space before each part from a normalizer.
    scheme = "first" if model.prefix and own else "never"
    if own or split:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, scheme, split)
    after = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*after, *([decoders.Strip(" ", 1, 0)] if model.prefix else [])])
    inner.add_special_tokens([piece.text for piece in pieces if piece.kind in (_UNKNOWN, _CONTROL)])
    inner.add_tokens([AddedToken(text, normalized=False) for text in own])
    return inner


def _ranks(pieces: Sequence[_Piece]) -> dict[str, float]:
    """Return when each piece that merges give is made, the earliest one lowest."""
    return {piece.text: -piece.score for piece in pieces if piece.kind == _NORMAL}


def merges_of(texts: Sequence[Any], ranks: Mapping[Any, float]) -> list[tuple[Any, Any]]:
    """Return all pairs that together are a token, in the order in which BPE joins them.

    Args:
        texts: the tokens, by id.
        ranks: of the tokens that take part in merges; the lowest rank is joined first.
    """
    index = {text: number for number, text in enumerate(texts)}
    found = []
    for text, rank in ranks.items():
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        pairs = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        found += [(rank, index[text], index[one], index[other], (one, other)) for one, other in pairs]
    return [each[-1] for each in sorted(found)]
