"""Near-duplicates, against the Jaccard similarity of all pairs, and against the index of `datasketch`."""

from __future__ import annotations

import json
import random
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import datasketch
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as h
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from shell import Shell

from sparsetrain.data import SourceConfig
from sparsetrain.data.dedup import DedupConfig, dedup
from sparsetrain.data.near_duplicates import RECALL, Signatures, choose_bands, jaccard, recall, shingles
from sparsetrain.data.sources.base import Fields
from sparsetrain.data.sources.files import LocalFiles
from sparsetrain.errors import UserError


def documents(count: int = 150, seed: int = 0) -> list[str]:
    """Random texts; half of them are earlier ones with some words changed, and a few are exact copies."""
    draw = random.Random(seed)
    vocabulary = [f"word{number}" for number in range(400)]
    found: list[str] = []
    for number in range(count):
        if number < 10 or draw.random() < 0.45:
            words = draw.choices(vocabulary, k=draw.randint(30, 120))
        else:
            words = draw.choice(found).split()
            for _ in range(draw.choice([0, 1, 1, 2, 3, 5, 8])):
                words[draw.randrange(len(words))] = draw.choice(vocabulary)
        found.append(" ".join(words))
    return found


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    return path


def run(path: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return dedup(DedupConfig(SourceConfig("file", str(path)), str(out), **settings), progress=False)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def runs_of(words: list[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + size]) for start in range(max(1, len(words) - size + 1))}


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_clusters_are_those_of_the_similarities_of_all_pairs(tmp_path: Path, threshold: float) -> None:
    texts = documents()
    path = write(tmp_path / "a.jsonl", texts)
    report = run(path, tmp_path / "out", threshold=threshold)
    sets = [runs_of(text.split(), 5) for text in texts]
    pairs = [
        (i, j)
        for i, j in combinations(range(len(texts)), 2)
        if len(sets[i] & sets[j]) >= threshold * len(sets[i] | sets[j])
    ]
    ends = np.array(pairs).T
    links = coo_array((np.ones(len(pairs)), tuple(ends)), shape=(len(texts), len(texts)))
    labels = connected_components(links, directed=False)[1].tolist()
    first = {label: number for number, label in reversed(list(enumerate(labels)))}
    kept = sorted(first.values())
    assert [row["id"] for row in rows(tmp_path / "out" / "kept.jsonl")] == [f"d{number}" for number in kept]
    seen: dict[str, int] = {}
    removed = []
    for number, text in enumerate(texts):
        exact = seen.setdefault(text, number) != number
        if number not in kept:
            kind = "exact" if exact else "near"
            removed.append({"id": f"d{number}", "kept": f"d{first[labels[number]]}", "kind": kind})
    assert rows(tmp_path / "out" / "removed.jsonl") == removed
    assert sum(row["kind"] == "near" for row in removed) > 20
    assert sum(row["kind"] == "exact" for row in removed) > 3
    sizes: dict[str, int] = {"exact": 0, "near": 0}
    for row in removed:
        sizes[row["kind"]] += len(texts[int(row["id"][1:])])
    assert report["exact_duplicates"]["bytes"] == sizes["exact"]
    assert report["near_duplicates"]["bytes"] == sizes["near"]
    assert report["read"] == {"documents": len(texts), "bytes": sum(map(len, texts))}
    distinct = {label: len({texts[n] for n, own in enumerate(labels) if own == label}) for label in set(labels)}
    assert report["near_duplicates"]["clusters"] == sum(count > 1 for count in distinct.values())
    assert report["near_duplicates"]["largest_cluster"] == max(distinct.values())
    assert report["compared_pairs"] < len(texts) ** 2 / 10
    for example in report["examples"]:
        one, other = (sets[int(name[1:])] for name in example["ids"])
        assert example["jaccard"] == len(one & other) / len(one | other) >= threshold


def test_what_is_kept_is_a_corpus_and_the_report_can_be_read(tmp_path: Path, capsys: Any) -> None:
    texts = documents(40)
    report = run(write(tmp_path / "a.jsonl", texts), tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["kept.jsonl", "removed.jsonl", "report.json", "report.md"]
    assert json.loads((out / "report.json").read_text()) == report
    found = {document.id: document.text for document in LocalFiles(str(out / "kept.jsonl")).documents()}
    assert all(texts[int(name[1:])] == text for name, text in found.items())
    shown = capsys.readouterr().out
    assert (out / "report.md").read_text() in shown
    assert f"| kept             | {len(found):10,} |" in shown
    assert "Jaccard similarity of at least 0.8 over shingles of 5 words" in shown


def test_groups_survive(tmp_path: Path, capsys: Any) -> None:
    place = tmp_path / "a.jsonl"
    rows = [{"id": f"d{i}", "text": text, "package": f"p{i % 5}"} for i, text in enumerate(documents(40))]
    place.write_text("\n".join(map(json.dumps, rows)))
    dedup(DedupConfig(SourceConfig(path=str(place), group_field="package"), str(tmp_path / "out")), progress=False)
    kept = LocalFiles(str(tmp_path / "out" / "kept.jsonl"), Fields(group="group"))
    assert all(document.group == f"p{int(document.id[1:]) % 5}" for document in kept.documents())
    assert "data.group_field=group keeps its groups together" in capsys.readouterr().out


def test_the_same_settings_give_the_same_bytes_and_another_seed_the_same_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", documents(80))
    for name, seed in (("one", 0), ("two", 0), ("other", 7)):
        run(path, tmp_path / name, seed=seed, threshold=0.6)
    for file in ("kept.jsonl", "removed.jsonl", "report.json", "report.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    for file in ("kept.jsonl", "removed.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_candidates_are_those_of_the_index_of_datasketch() -> None:
    sets = [shingles(text, 5, "words") for text in documents(120, seed=3)]
    signatures = Signatures(64, 16, 4, seed=5)
    index = datasketch.MinHashLSH(num_perm=64, params=(16, 4))
    sketches = []
    for number, of in enumerate(sets):
        signatures.add(of)
        sketch = datasketch.MinHash(64, seed=5)
        for shingle in of:
            sketch.update(shingle.encode())
        assert (signatures.signature(of) == sketch.hashvalues).all()
        index.insert(number, sketch)
        sketches.append(sketch)
    expected = {(min(n, m), max(n, m)) for n, sketch in enumerate(sketches) for m in index.query(sketch) if n != m}
    found = {pair for group in signatures.candidates() for pair in combinations(group.tolist(), 2)}
    assert found == expected
    assert len(found) > 20


@given(h.floats(0.3, 1.0), h.sampled_from([64, 128, 256]))
def test_bands_find_a_pair_at_the_threshold(threshold: float, permutations: int) -> None:
    bands, width = choose_bands(threshold, permutations)
    assert bands * width <= permutations
    # No band of the signature agrees, or one does.
    assert 1 - recall(threshold, bands, width) == pytest.approx((1 - threshold**width) ** bands, abs=1e-12)
    assert recall(threshold, bands, width) >= RECALL
    assert all(recall(threshold, permutations // more, more) < RECALL for more in range(width + 1, permutations + 1))


@given(h.text(alphabet="aB c,.\n", max_size=30), h.integers(1, 4))
def test_shingles_are_runs_of_words_or_characters(text: str, size: int) -> None:
    words = text.lower().replace(",", " ").replace(".", " ").split()
    if words:
        assert shingles(text, size, "words") == {" ".join(run) for run in runs_of(words, size)}
    else:
        assert len(shingles(text, size, "words")) == 1
    assert shingles(text, size, "characters") == {
        "".join(r) for r in runs_of(list(" ".join(text.lower().split())), size)
    }
    assert jaccard(shingles(text, size, "words"), shingles(text, size, "words")) == 1.0


def test_text_without_spaces_is_compared_by_characters(tmp_path: Path) -> None:
    draw = random.Random(1)
    base = "".join(chr(0x4E00 + draw.randrange(500)) for _ in range(300))
    path = write(tmp_path / "a.jsonl", [base, base[:150] + "新" + base[151:], base[::-1]])
    assert run(path, tmp_path / "w")["kept"]["documents"] == 3
    assert run(path, tmp_path / "c", unit="characters", shingle=4)["kept"]["documents"] == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"threshold": 0.0}, r"^threshold=0\.0 must be above 0 and at most 1"),
        ({"shingle": 0}, "^shingle=0 must be at least 1"),
        ({"unit": "word"}, r"^unit='word' .*did you mean 'words'"),
        ({"permutations": 0}, "^permutations=0 must be from 1 to 4096"),
        ({"seed": -1}, "^seed=-1 must be from 0 to"),
        ({"threshold": 0.03}, r"^permutations=128 are too few for threshold=0\.03: .* probability 0\.980"),
    ],
)
def test_settings_out_of_range_are_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        DedupConfig(**settings)


def test_nothing_is_overwritten_or_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", ["a text"])
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError, match=r"^out=.*here exists; delete it, or choose another directory"):
        run(path, tmp_path / "here")
    path.write_text('{"text": "a"}\n{"text": 7}\n')
    with pytest.raises(UserError, match="line 2"):
        run(path, tmp_path / "new" / "out")
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match=r"need datasketch: pip install 'sparsetrain\[dedup\]'"):
        run(path, tmp_path / "new" / "out")
    assert not any((tmp_path / "new").iterdir())


def test_the_command_is_two_words_or_one(shell: Shell) -> None:
    texts = documents(30)
    write(Path("a.jsonl"), texts)
    status, out, err = shell.run("data", "dedup", "data.path=a.jsonl", "out=two", "threshold=0.7")
    assert (status, err) == (0, "")
    assert "| near-duplicates  |" in out
    assert shell.run("data-dedup", "data.path=a.jsonl", "out=one", "threshold=0.7")[0] == 0
    assert Path("one/kept.jsonl").read_bytes() == Path("two/kept.jsonl").read_bytes()
    assert "did you mean 'threshold'" in shell.refused("data", "dedup", "treshold=0.7")
    assert "out=one exists" in shell.refused("data", "dedup", "data.path=a.jsonl", "out=one")
    assert "  threshold = 0.8  number above 0 and at most 1\n" in shell.run("data", "dedup", "--help")[1]
