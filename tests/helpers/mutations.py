"""Mutations of files for a fuzzer: of bits, tokens, values of JSON and YAML, and members of archives."""

from __future__ import annotations

import io
import json
import math
import random
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

# ----------------------------------------------------------------------------------------------------- bytes


def _span(content: bytes, draw: random.Random) -> tuple[int, int]:
    start = draw.randrange(len(content) + 1)
    return start, min(len(content), start + draw.choice((1, 2, 4, 8, 40, 400)))


def flip(content: bytes, draw: random.Random) -> bytes:
    """Flip a bit."""
    if not content:
        return content
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]


def cut(content: bytes, draw: random.Random) -> bytes:
    """Cut the end off."""
    return content[: draw.randrange(len(content) + 1)]


def splice(content: bytes, draw: random.Random) -> bytes:
    """Remove a span, repeat it, or copy it over or into another place."""
    (start, end), (at, until) = _span(content, draw), _span(content, draw)
    piece = content[start:end]
    return draw.choice(
        (
            content[:start] + content[end:],
            content[:end] + piece * draw.choice((1, 2, 50)) + content[end:],
            content[:at] + piece + content[at:],
            content[:at] + piece + content[until:],
        )
    )


def overwrite(content: bytes, draw: random.Random) -> bytes:
    """Overwrite a span with zeros, ones, random bytes, or an extreme binary integer."""
    start, end = _span(content, draw)
    size = end - start
    number = draw.choice((0, 1, -1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 10**9))
    filler = draw.choice(
        (bytes(size), b"\xff" * size, draw.randbytes(size), number.to_bytes(9, "little", signed=True)[:8])
    )
    return content[:start] + filler + content[start + len(filler) :]


BYTES: tuple[Mutation, ...] = (flip, cut, splice, overwrite)

# ----------------------------------------------------------------------------------------------------- text

NUMBERS = (
    *("0", "-1", "1", "2", "0.5", "-0.0", "2.7", "1e308", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "nan"),
    *("2147483648", "4294967296", "9223372036854775807", "9223372036854775808", "18446744073709551616", "inf"),
    *("1" + "0" * 30, "9" * 400, "9" * 5000, "1e-999", "00", "0x10", "1_000", "٣", "1:2:3"),
)
PIECES = (
    *('"x"', "null", "true", "false", "[]", "{}", "[1]", '{"a": 1}', '""', "~", "yes", "''", '"', "'", ",", ":"),
    *(
        '"\\ud800"',
        '"\\u0000"',
        '"\\n"',
        "[/b]",
        "[red]",
        "\x1b[31m",
        "\ufeff",
        "\x00",
        "\u2028",
        "\r",
        "\t",
        "\n",
        " ",
    ),
    *("\n", "&a", "*a", "&b [*a, *a]", "<<: *a", "!!python/object:os.system", "- ", "? ", "# ", "%", "2001-01-01"),
    *("[" * 3000, '{"a":' * 3000, "- " * 500, "é" * 3, "日本", "\U0001f600", "x" * 3000, ",x" * 200),
)
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|\w+|\s+|.', re.DOTALL)


def _tokens(content: bytes) -> list[str]:
    return _TOKEN.findall(content.decode("utf-8", "surrogateescape"))


def _joined(tokens: list[str]) -> bytes:
    return "".join(tokens).encode("utf-8", "surrogateescape")


def tokens(content: bytes, draw: random.Random) -> bytes:
    """Replace a token by an extreme one, remove or repeat it, or swap it with another."""
    found = _tokens(content)
    if not found:
        return draw.choice(PIECES).encode()
    one, other = draw.randrange(len(found)), draw.randrange(len(found))
    match draw.randrange(6):
        case 0:
            found[one] = draw.choice(PIECES)
        case 1:
            found.insert(one, draw.choice(PIECES))
        case 2:
            del found[one]
        case 3:
            found[one] *= 2
        case 4:
            found[one], found[other] = found[other], found[one]
        case 5:
            numeric = [place for place, token in enumerate(found) if token.lstrip("-")[:1].isdigit()]
            found[draw.choice(numeric or [one])] = draw.choice(NUMBERS)
    return _joined(found)


def lines(content: bytes, draw: random.Random) -> bytes:
    """Remove, repeat or swap lines, or change the end of a line."""
    found = content.splitlines(keepends=True)
    if not found:
        return b"\n"
    one, other = draw.randrange(len(found)), draw.randrange(len(found))
    match draw.randrange(4):
        case 0:
            del found[one]
        case 1:
            found.insert(other, found[one])
        case 2:
            found[one], found[other] = found[other], found[one]
        case 3:
            found[one] = found[one].rstrip(b"\n") + draw.choice((b"", b"\r\n", b"\r", b"\n\n", b"\x0b\n"))
    return b"".join(found)


_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.5, 2.7, 256.0, 1e300, math.nan, math.inf),
    *(2**31, 2**63, 2**64, 10**30, 10**9),
    *("", "x", "1", "[/b]", "[red]nan", "\x1b[2J", "日本", "a\nb", "../../x", "x" * 500, "\ud800", "\x00"),
    *([], [1], [None], ["x"], [[]], [[[0.5]]], {}, {"a": 1}, {"": {}}, {"x": [1]}),
)


def _slots(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container with each of its keys or indices."""
    stack = [value]
    while stack:
        inside = stack.pop()
        for key in list(inside) if isinstance(inside, dict) else range(len(inside)):
            yield inside, key
            if isinstance(inside[key], dict | list):
                stack.append(inside[key])


def _restructure(value: Any, draw: random.Random) -> Any:
    """Replace or remove a value, or swap two values."""
    slots = list(_slots(value)) if isinstance(value, dict | list) else []
    if not slots or draw.random() < 0.03:
        return draw.choice(_VALUES)
    inside, key = draw.choice(slots)
    match draw.randrange(5):
        case 0:
            del inside[key]
        case 1:
            other, place = draw.choice(slots)
            inside[key] = json.loads(json.dumps(other[place]))
        case 2 if isinstance(inside, list):
            inside.insert(key, draw.choice(_VALUES))
        case 2:
            inside[draw.choice(("x", "", "a.b", "[b]", "1"))] = draw.choice(_VALUES)
        case _:
            inside[key] = draw.choice(_VALUES)
    return value


def json_values(content: bytes, draw: random.Random) -> bytes:
    """Change the values of JSON, and write it as valid JSON again (with NaN, and with lone surrogates)."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return tokens(content, draw)
    return json.dumps(_restructure(value, draw)).encode()


def json_line_values(content: bytes, draw: random.Random) -> bytes:
    """Change the values in one line of JSON lines, as in JSON."""
    found = content.split(b"\n")
    at = draw.randrange(len(found))
    found[at] = json_values(found[at], draw)
    return b"\n".join(found)


def yaml_values(content: bytes, draw: random.Random) -> bytes:
    """Change the values of YAML, as in JSON."""
    import yaml

    try:
        return yaml.safe_dump(_restructure(yaml.safe_load(content), draw), sort_keys=False).encode()
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return tokens(content, draw)


def csv_cells(content: bytes, draw: random.Random) -> bytes:
    """Put an extreme text into a cell, or add or remove a cell, and write the table again."""
    rows = [line.split(",") for line in content.decode("utf-8", "surrogateescape").split("\n")]
    row = draw.choice(rows)
    match draw.randrange(4):
        case 0:
            row.pop(draw.randrange(len(row)))
        case 1:
            row.insert(draw.randrange(len(row) + 1), draw.choice(PIECES))
        case _:
            row[draw.randrange(len(row))] = draw.choice((*NUMBERS, *PIECES))
    return "\n".join(",".join(row) for row in rows).encode("utf-8", "surrogateescape")


TEXT: tuple[Mutation, ...] = (*BYTES, tokens, tokens, lines)
JSON: tuple[Mutation, ...] = (*TEXT, json_values, json_values, json_values)
JSON_LINES: tuple[Mutation, ...] = (*TEXT, json_line_values, json_line_values)
YAML: tuple[Mutation, ...] = (*TEXT, yaml_values, yaml_values)
CSV: tuple[Mutation, ...] = (*TEXT, csv_cells, csv_cells)


def zip_members(content: bytes, draw: random.Random) -> bytes:
    """Change the bytes of a member of a zip archive, its name or its order, with valid checksums."""
    stream = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(member.filename, archive.read(member)) for member in archive.infolist()]
    except Exception:  # zipfile may raise anything on a file that earlier mutations damaged
        return flip(content, draw)
    if members:
        at = draw.randrange(len(members))
        name, inside = members[at]
        match draw.randrange(8):
            case 0:
                del members[at]
            case 1:
                members[at] = (members[draw.randrange(len(members))][0] + draw.choice(("", "", "x")), inside)
            case _:
                members[at] = (name, draw.choice((flip, cut, overwrite, overwrite, tokens))(inside, draw))
    with zipfile.ZipFile(stream, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, inside in dict(members).items():
            archive.writestr(name, inside)
    return stream.getvalue()


def safetensors_header(content: bytes, draw: random.Random) -> bytes:
    """Change the values or the text of a safetensors header, and store the new length before it."""
    length = int.from_bytes(content[:8], "little")
    if not 2 <= length <= len(content) - 8:
        return flip(content, draw)
    header = draw.choice((json_values, json_values, tokens))(content[8 : 8 + length], draw)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]
