"""Tokenizers of other kinds, against the libraries that they come from, and the bytes of a text under each of them."""

from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as h
from tokenizers import AddedToken, models, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizerFast

from sparsetrain.data import (
    Corpus,
    DataConfig,
    Example,
    TaskBatches,
    open_corpus,
    prepare,
    scored_tokens,
    sequential_windows,
)
from sparsetrain.data.tokenizer import _NOTES, Tokenizer
from sparsetrain.data.tokenizer_formats.tiktoken import _CL100K, _O200K, _R50K
from sparsetrain.errors import UserError
from sparsetrain.training.evaluate import score_text

LINE = "the model learns of cells and genes, a Study of blood pressure; naïve cafés in 12 trials"
WORDS = LINE.split()
TEXT = "\n".join(" ".join(WORDS[place:] + WORDS[:place]) for place in range(len(WORDS))) + "\n"
TEXTS = ["the model", " the model", "a  b", "x\r\ny", "日本 Study", "[SEP] </s> <0x41>", "", " ", "naïve\tcafé 12"]
Pieces = tuple[Tokenizer, sentencepiece.SentencePieceProcessor]
any_text = h.text(alphabet=h.sampled_from("the model\n\t 12.,né日😀▁<s>/[SEP]"), max_size=40)


def warned(load: Callable[[], Tokenizer]) -> Tokenizer:
    """Return a tokenizer; the first one of a content warns."""
    _NOTES.clear()
    with pytest.warns(UserWarning, match="may not give a text back as it was"):
        return load()


def word_pieces(folder: Path, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789.,;"))
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    known += ["the", "model", "##s", "study", "Study"]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(known)) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def pieces(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, object]:
    """A SentencePiece model that the library trains, read by us and by it."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "text.txt").write_text(TEXT * 3)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "m"), vocab_size=340, model_type=request.param,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
        minloglevel=2, num_threads=1, user_defined_symbols="",
    )  # fmt: skip
    ours = warned(lambda: Tokenizer.load(folder / "m.model"))
    return ours, sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))


@given(text=any_text)
def test_ids_are_those_of_sentencepiece(
    pieces: tuple[Tokenizer, sentencepiece.SentencePieceProcessor], text: str
) -> None:
    """So is their text. The name of a special token is text that the vocabulary may not know."""
    ours, theirs = pieces
    assert ours.eos_id == theirs.eos_id()
    if not any(name in text for name in ("<s>", "</s>", "<unk>")):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert ours.eos_id not in ours.encode(text)


def test_a_continuation_has_no_second_space(pieces: Pieces) -> None:
    """An answer behind a question has the tokens that it has in one text with it."""
    ours, _ = pieces
    question = ours.encode("a Study of\nthe model:")
    assert question + ours.encode_continuation(" cells") == ours.encode("a Study of\nthe model: cells")
    assert ours.encode(" cells") != ours.encode_continuation(" cells")
    assert ours.encode_continuations(["12", " the"]) == [
        ours.encode_continuation("12"),
        ours.encode_continuation(" the"),
    ]


def test_the_answers_of_a_task_are_continuations(pieces: Pieces) -> None:
    """In training and in scoring, question and answer have the tokens that they have in one text."""
    ours, _ = pieces
    question, answers = "a Study of\nthe model:", (" cells", " models")
    asked = [Example("1", question, 0), Example("2", question, 1)]
    batch = TaskBatches(asked, ours, answers, 64, 2, 0, "x").batch(0, 2)
    rows = [[token for token in row if token != ours.eos_id] for row in batch.tokens.tolist()]
    assert sorted(rows) == sorted(ours.encode(question + answer) for answer in answers)
    assert scored_tokens(answers, ours) == ours.encode_continuations(answers)


def test_normalization_and_symbols_of_a_user(tmp_path: Path) -> None:
    """Symbols of the user's stay whole, and the text between them gets no space of its own."""
    (tmp_path / "text.txt").write_text(TEXT * 3)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "m"), vocab_size=120, model_type="unigram",
        user_defined_symbols="<sep>", eos_piece="<end>", hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    ours = warned(lambda: Tokenizer.load(tmp_path / "m.model"))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert (ours.eos_token, ours.eos_id) == ("<end>", theirs.eos_id())
    for text in ("the model<sep>learns of cells", "ﬁne  cells", "a <sep> b"):
        assert ours.encode(text) == theirs.encode(text), text


@pytest.mark.parametrize("content", [b"", b"\x00", b"no model", b"\x0a\x05\x0a\x03abc", b"\xff" * 40])
def test_a_damaged_model_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.model").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.tokenizer_path=.*m\.model: ") as caught:
        Tokenizer.load(tmp_path / "m.model")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    """Bytes and some merges, as tiktoken ranks them."""
    inner = Tokenizer.train([TEXT] * 3, 330)
    spellings = [spelling for spelling in inner.spellings if isinstance(spelling, bytes)]
    return {spelling: rank for rank, spelling in enumerate(sorted(spellings, key=lambda one: len(one) > 1))}


@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_ids_are_those_of_tiktoken(ranks: dict[bytes, int], tmp_path: Path, name: str) -> None:
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    (tmp_path / f"{name}.tiktoken").write_bytes(b"".join(lines))
    # The id of the end is beyond these few ranks, as it is not beyond the real ones.
    with pytest.raises(UserError, match="a model has a row for every id"):
        Tokenizer.load(tmp_path / f"{name}.tiktoken")
    pattern = {"r50k_base": _R50K, "cl100k_base": _CL100K, "o200k_base": _O200K}[name]
    theirs = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    with pytest.MonkeyPatch.context() as patch:
        from sparsetrain.data.tokenizer_formats import tiktoken as formats

        own = formats._Encoding(pattern, {"<|endoftext|>": len(ranks) + 3})
        patch.setitem(formats._ENCODINGS, name, own)
        ours = Tokenizer.load(tmp_path / f"{name}.tiktoken")
    assert (ours.vocab_size, ours.lossless) == (len(ranks) + 4, True)  # three ids are not used
    for text in (*TEXTS, TEXT, "We'LL  see\n\n  3.14159!?\r\n/x"):
        assert ours.encode(text) == theirs.encode(text, disallowed_special=())
        assert ours.decode(ours.encode(text)) == text
    assert ours.token_bytes.tolist()[-4:] == [0] * 4


def test_a_file_of_ranks_without_a_known_name_says_how_it_is_cut(ranks: dict[bytes, int], tmp_path: Path) -> None:
    content = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    (tmp_path / "tokenizer.model").write_bytes(content)  # Llama 3 has such a file
    with pytest.warns(UserWarning, match="they are cut as cl100k_base does"):
        tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.eos_token, tokenizer.eos_id, tokenizer.lossless) == ("<|endoftext|>", len(ranks), True)
    (tmp_path / "x.tiktoken").write_bytes(content.replace(b" 7\n", b" seven\n", 1))
    with pytest.raises(UserError, match="line 8 is not a token in base64 and its rank"):
        Tokenizer.load(tmp_path / "x.tiktoken")


@pytest.mark.parametrize("lower", [True, False])
def test_ids_are_those_of_transformers_for_a_vocabulary_of_bert(tmp_path: Path, lower: bool) -> None:
    folder = word_pieces(tmp_path / "bert", do_lower_case=lower)
    ours = warned(lambda: Tokenizer.load(folder, "[SEP]"))
    theirs = BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=lower)
    for text in (TEXT, *TEXTS):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), text
    assert (ours.eos_token, ours.eos_id) == ("[SEP]", 3)
    assert ours.encode_continuation(" models") == ours.encode("models")


def test_the_two_files_of_gpt_2_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    trained = Tokenizer.train([TEXT] * 3, 300)
    layout = json.loads(trained.content)
    (tmp_path / "vocab.json").write_text(json.dumps({**layout["model"]["vocab"], trained.eos_token: trained.eos_id}))
    merges = [" ".join(pair) for pair in layout["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.lossless
    for text in (TEXT, *TEXTS):
        assert ours.encode(text) == theirs.encode(text)


def test_a_directory_names_its_end(tmp_path: Path) -> None:
    """The setting goes before the configuration, and the copy of a run knows its end without either."""
    content = json.loads(Tokenizer.bytes().content)
    for number, name in enumerate(("<|eot|>", "<|other|>"), start=257):
        content["added_tokens"].append({**content["added_tokens"][0], "id": number, "content": name})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).content == (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [258, 257]}')
    assert Tokenizer.load(tmp_path).eos_token == "<|other|>"
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|eot|>"}}')
    named = Tokenizer.load(tmp_path)
    assert (named.eos_token, named.eos_id, named.vocab_size) == ("<|eot|>", 257, 259)
    assert Tokenizer.load(tmp_path, "<|other|>").eos_id == 258
    (tmp_path / "run").mkdir()
    named.save(tmp_path / "run" / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "run")
    assert (again.eos_id, again.sha256) == (257, named.sha256)
    assert Tokenizer.load(tmp_path / "run", "<|eot|>").content == named.content
    assert again.with_sentinels().eos_id == 257
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "run" / "tokenizer.json")).encode("a").ids == [97]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, r"no token that ends a document; .*data\.eos_token \(its special tokens are \[PAD\], \[UNK\], "),
        ("the", "data.eos_token='the': ordinary text gives this token of .* too"),
        ("[SEB]", r"data.eos_token='\[SEB\]' is no token of .* \(did you mean '\[SEP\]'\?\)"),
        ("[UNK]", r"the token '\[UNK\]' stands for unknown text, so it cannot end a document"),
    ],
)
def test_an_end_that_is_none_is_one_line(tmp_path: Path, name: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(word_pieces(tmp_path / "bert"), name)
    assert "\n" not in str(caught.value)


def test_the_name_of_a_special_token_in_a_text_is_unknown_text() -> None:
    """A model of words gives such a name its token, which would end the document."""
    inner = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<unk>", "</s>"])
    tokenizer = warned(lambda: Tokenizer(inner.to_str().encode()))
    assert tokenizer.encode("a </s> a") == [2, 0, 2]
    assert tokenizer.encode_batch(["</s>"]) == [[0]]
    assert tokenizer.count_unknown([2, 0, 2]) == 1
    silent = tokenizers.Tokenizer(models.Unigram([("</s>", 0.0), ("a", -1.0)]))
    silent.add_special_tokens([AddedToken("</s>")])
    with pytest.raises(UserError, match=r"the special token '</s>' is one that ordinary text gives|cannot encode"):
        Tokenizer(silent.to_str().encode())


def test_a_name_of_the_hub_without_the_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"data.tokenizer_path=owner/name: no such file, and the Hugging Face hub"
    ) as caught:
        Tokenizer.load("owner/name")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'sparsetrain\[hf\]'"):
        Tokenizer.load("owner/other")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match=r"pip install 'sparsetrain\[tiktoken\]'"):
        Tokenizer.load("o200k_base")
    with pytest.raises(UserError, match=r"no such file in this directory: it has none of tokenizer\.json, "):
        Tokenizer.load(tmp_path)


# ------------------------------------------------------------------------------------------------ bytes of a corpus


def counted(corpus: Corpus, text: bytes, context: int = 7) -> tuple[int, float]:
    """Return the bytes of the evaluated text, and its bits per byte if each token costs a nat."""
    windows = sequential_windows(corpus.validation, context)
    first = corpus.validation.bytes(0, 1)
    assert windows.bytes is not None
    assert first is not None
    assert int(windows.bytes.sum()) + int(first) == len(text)
    score = score_text(torch.nn.Identity(), lambda batch: (batch.targets >= 0).double(), windows.split(3))
    assert score.tokens == len(corpus.validation) - 1
    return score.bytes, score.bits_per_byte


def held_out(corpus: Corpus) -> bytes:
    """The validation text of the same corpus under a tokenizer of bytes."""
    ids = corpus.validation.window(0, len(corpus.validation)).tolist()
    return bytes(token for token in ids if token != corpus.tokenizer.eos_id)


def test_bits_per_byte_are_of_the_bytes_of_the_text(tmp_path: Path, pieces: Pieces) -> None:
    """Under bytes, WordPiece, which drops and changes text, and SentencePiece: those of one text, counted by Python."""
    (tmp_path / "a.txt").write_bytes(b"  " + TEXT.encode() * 20 + b"\r\n  the end \xe6\x97\xa5\n\n")
    plain = prepare(DataConfig(path=str(tmp_path / "a.txt"), tokenizer="bytes"), progress=False)
    text = held_out(plain)
    assert text.endswith("日\n\n".encode())
    counted(plain, text)
    pieces[0].save(tmp_path / "pieces.json")
    folder = word_pieces(tmp_path / "bert")
    for path, end in ((folder, "[SEP]"), (tmp_path / "pieces.json", None)):
        config = DataConfig(path=str(tmp_path / "a.txt"), tokenizer_path=str(path), eos_token=end)
        corpus = _prepared_with_warning(config)
        size, bits = counted(corpus, text)
        assert bits == pytest.approx((len(corpus.validation) - 1) / math.log(2) / size)
        assert corpus.manifest["splits"]["validation"]["bytes"] == len(text)
        again = open_corpus(corpus.directory)
        assert counted(again, text) == (size, bits)
        if path == folder:
            assert corpus.notes()[1].startswith("tokenizer: 2 of 2 documents do not come back as they were; ")
            assert corpus.manifest["round_trip"]["unknown_tokens"] > 0
        else:
            assert corpus.manifest["round_trip"]["changed"] == 0
        damaged = corpus.directory / "validation.bytes.bin"
        damaged.write_bytes(bytes([damaged.read_bytes()[0] ^ 1]) + damaged.read_bytes()[1:])
        with pytest.raises(UserError, match=r"validation\.bytes\.bin is damaged"):
            open_corpus(corpus.directory)


def _prepared_with_warning(config: DataConfig) -> Corpus:
    _NOTES.clear()
    with pytest.warns(UserWarning, match="it is not byte-level BPE"):
        return prepare(config, progress=False)


@given(text=any_text)
def test_the_bytes_of_tokens_sum_to_those_of_any_text(pieces: Pieces, text: str) -> None:
    for continued in (False, True):
        ((ids, sizes),) = pieces[0].encode_sized([text], [continued])
        assert len(sizes) == len(ids) + 1
        assert min(sizes) >= 0
        assert sum(sizes) == len(text.encode())
