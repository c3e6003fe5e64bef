"""Tokenizer files: a lossy setting is said by name, and a file without one restores every text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library
from tokenizers.decoders import ByteLevel as Decoder
from tokenizers.pre_tokenizers import ByteLevel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sparsetrain.data.tokenizer import END_OF_TEXT, Tokenizer
from sparsetrain.data.tokenizer_file import byte_symbols, decoded
from sparsetrain.errors import UserError

Change = Callable[[dict[str, Any]], object]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def content(pre: Any = None, normalizer: Any = None, added: Any = None) -> bytes:
    """Return a file that the library writes, with one setting changed."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre or ByteLevel(add_prefix_space=False)
    library.decoder = Decoder()
    if normalizer is not None:
        library.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END_OF_TEXT], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator(["the same words again and again"] * 50, trainer)
    if added is not None:
        library.add_tokens([added])
    return str(library.to_str()).encode()


def changed(change: Change, file: bytes | None = None) -> bytes:
    """Return the file with its layout changed."""
    layout = json.loads(file or content())
    change(layout)
    return json.dumps(layout).encode()


def added(text: str, **settings: bool) -> Change:
    token = {"id": 300, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return lambda layout: layout["added_tokens"].append({**token, "special": False, **settings})


def steps(*members: dict[str, Any]) -> Change:
    def change(layout: dict[str, Any]) -> None:
        layout["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*members]}

    return change


def split(pattern: str, behavior: str = "Isolated") -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


NO_MERGES = changed(lambda layout: layout["model"].update(merges=[]))
LOSING = [
    # steps before the model
    (
        content(pre=ByteLevel()),
        "its pre_tokenizer ByteLevel puts a space before each text; for example 'a' comes back as ' a'",
    ),
    (content(normalizer=normalizers.NFKC()), "its normalizer 'NFKC' rewrites text"),
    (content(normalizer=normalizers.Sequence([normalizers.NFC()])), "its normalizer 'NFC' rewrites text"),
    (
        content(normalizer=normalizers.Lowercase()),
        "'Lowercase' rewrites text; for example .* comes back",
    ),
    (
        content(pre=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), ByteLevel(add_prefix_space=False)])),
        "its pre_tokenizer 'WhitespaceSplit' may leave out characters",
    ),
    (changed(steps(split(r"\s", "Removed"), BYTES)), "'Split' may leave out characters"),
    (changed(steps({"type": "UnicodeScripts"}, BYTES)), "'UnicodeScripts' may leave out characters"),
    (changed(steps(BYTES, BYTES)), "it maps bytes to symbols twice"),
    (
        changed(lambda layout: layout.update(pre_tokenizer={"type": "Whitespace"})),
        r"it is not byte-level BPE \(its model is BPE, its pre_tokenizer Whitespace\)",
    ),
    (changed(lambda layout: layout.update(pre_tokenizer=None)), "it is not byte-level BPE"),
    (changed(lambda layout: layout.update(decoder=None)), "its decoder is not ByteLevel"),
    # the model
    (changed(lambda layout: layout["model"].update(end_of_word_suffix="</w>")), "end_of_word_suffix='</w>'"),
    (
        changed(lambda layout: layout["model"].update(continuing_subword_prefix="##"), NO_MERGES),
        "continuing_subword_prefix='##'",
    ),
    # added tokens
    (content(added=AddedToken("<m>", lstrip=True, rstrip=True)), "its added token '<m>' swallows the white space"),
    (content(added=AddedToken("<m>", rstrip=True)), "its added token '<m>' swallows the white space"),
    (changed(added("é")), "its added token 'é' decodes to another text"),
    (changed(added("Ġ")), "its added token 'Ġ' decodes to another text"),
]
REFUSED = [
    (changed(steps(split("(a+)+$"), BYTES)), "cannot encode 'aaaa"),
    (changed(lambda layout: layout["model"]["vocab"].update(a=4 * 10**9)), "ids up to 4000000000; a model has a row"),
    (changed(lambda layout: layout["model"]["vocab"].update(a=layout["model"]["vocab"]["b"])), "have the same id"),
    (changed(lambda layout: layout["model"]["vocab"].pop("a"), NO_MERGES), r"no token for 1 of the 256 bytes \(0x61\)"),
    (changed(lambda layout: layout["model"].update(dropout=0.1)), "dropout=0.1 makes the tokens of a text random"),
    (changed(added("am", special=True)), "the special token 'am' is one that ordinary text gives"),
    (changed(added("a", special=True)), "the special token 'a' is one that ordinary text gives"),
    (changed(lambda layout: layout["added_tokens"][0].update(special=False)), "no token that ends a document"),
    # not a tokenizer.json
    (b"\xff", "not a tokenizer.json"),
    (b"[" * 100_000, "not a tokenizer.json"),
    (b"[]", "not a tokenizer.json"),
    (b'{"model": {}}', "not a tokenizer.json"),
]


@pytest.mark.parametrize(("file", "message"), LOSING)
def test_a_file_that_loses_text_is_used_and_its_setting_said(file: bytes, message: str) -> None:
    """The warning names the file and the part of it that loses text. The bytes of its tokens are those of the text."""
    with pytest.warns(UserWarning, match=message) as said:
        tokenizer = Tokenizer(file, origin="own.json")
    assert [str(warning.message) for warning in said] == [tokenizer.note]
    assert tokenizer.note.startswith("the tokenizer own.json may not give a text back as it was: ")
    assert not tokenizer.lossless
    for text in ("a  Again\n é ﬁ <m> 日本", "", " "):
        for continued in (False, True):
            ((ids, sizes),) = tokenizer.encode_sized([text], [continued])
            assert (len(sizes), sum(sizes)) == (len(ids) + 1, len(text.encode()))
        assert tokenizer.encode_sized([text], [False])[0][0] == tokenizer.encode(text)
    with pytest.raises(UserError, match="needs a byte-level tokenizer that gives every text back, and the"):
        _ = tokenizer.token_bytes


@pytest.mark.parametrize(("file", "message"), REFUSED)
def test_a_file_that_cannot_be_used_is_refused(file: bytes, message: str) -> None:
    """The error names the setting of the configuration, the file, and the part of the file."""
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer(file, origin="own.json")
    assert str(caught.value).startswith("data.tokenizer_path=own.json: ")
    assert "\n" not in str(caught.value)


KEEPING = {
    "gpt-2": content(),
    "of old, without a type": changed(lambda layout: layout["model"].pop("type")),
    "llama 3": changed(steps(split(LLAMA_3), BYTES)),
    "digits and punctuation": changed(
        steps(
            {"type": "Punctuation", "behavior": "Contiguous"},
            {**BYTES, "use_regex": True},
            {"type": "Digits", "individual_digits": True},
        )
    ),
    "taken whole": changed(lambda layout: layout["model"].update(ignore_merges=True)),
    "unknown tokens": changed(lambda layout: layout["model"].update(unk_token=END_OF_TEXT, byte_fallback=True)),
    "no normalizers": changed(lambda layout: layout.update(normalizer={"type": "Sequence", "normalizers": []})),
    "blanks as tokens": changed(added("    ", normalized=True)),
    "japanese token": changed(added("日本")),
    "single word": changed(added("<m>", single_word=True)),
    "mask of roberta": changed(added("<mask>", special=True, lstrip=True)),
    "truncation": changed(
        lambda layout: layout.update(
            truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
        )
    ),
    "padding": changed(
        lambda layout: layout.update(
            padding={
                "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
                "pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_TEXT,
            }
        )
    ),
    "an end by the post-processor": changed(
        lambda layout: layout.update(
            post_processor={"type": "RobertaProcessing", "sep": [END_OF_TEXT, 0], "cls": [END_OF_TEXT, 0],
                            "trim_offsets": True, "add_prefix_space": True}
        )
    ),
}  # fmt: skip
any_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
pieces = st.lists(
    any_text | st.sampled_from(["<m>", "<mask>", "    ", "日本", END_OF_TEXT, " again", "123456"]), max_size=6
)


@pytest.fixture(scope="module", params=KEEPING)
def kept(request: pytest.FixtureRequest) -> Tokenizer:
    """A lossless tokenizer, for each case of KEEPING."""
    return Tokenizer(KEEPING[request.param])


@given(text=pieces.map("".join))
@example(text="a <mask> b  <m> c")
def test_an_accepted_file_gives_back_any_text_and_counts_its_bytes(kept: Tokenizer, text: str) -> None:
    """Settings that add, pad or cut have no effect, and the name of a special token inside a text is ordinary text."""
    tokenizer = kept
    ids = tokenizer.encode(text)
    assert tokenizer.encode_batch([text, ""]) == [ids, []]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())


def test_symbols_of_bytes_match_transformers() -> None:
    """The alphabet is the one of GPT-2."""
    expected = bytes_to_unicode()
    assert dict(enumerate(byte_symbols())) == expected


@given(any_text)
def test_tokens_are_decoded_as_the_library_decodes_them(token: str) -> None:
    """A token of byte symbols decodes to bytes, and any other token to itself."""
    assert decoded(token).decode(errors="replace") == Decoder().decode([token])


def test_text_that_no_utf_8_can_hold_is_refused() -> None:
    """A lone surrogate, which a terminal may pass for an invalid byte, gives a one-line error."""
    with pytest.raises(UserError, match="cannot encode a text"):
        Tokenizer.bytes().encode("a\udcff")
    with pytest.raises(UserError, match="cannot encode a text"):
        Tokenizer.bytes().encode_batch(["a", "a\ud800"])


@pytest.mark.parametrize("path", ["~nosuchuser/t.json", "x" * 5000, "a\0b"])
def test_a_path_that_is_none_is_one_line(path: str) -> None:
    """The cases are an unknown user, a name that is too long, and a zero byte."""
    with pytest.raises(UserError, match=r"data\.tokenizer_path="):
        Tokenizer.load(path)
