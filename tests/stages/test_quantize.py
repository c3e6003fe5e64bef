"""``sparsetrain quantize``: the report against the files on disk, and text from the quantized model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from shell import Shell

import sparsetrain as st
from sparsetrain.runs.result import finished

PARTS = ["dense matrices", "embedding and head", "norms and biases", "sparse index", "sparse values"]


def test_a_run_is_quantized_and_generates(trained: Callable[..., Path], shell: Shell) -> None:
    run = trained()
    status, out, err = shell.run("quantize", str(run), "out=q", "group=32")
    assert (status, err) == (0, "")
    directory = shell.home / "q"
    assert {path.name for path in directory.iterdir()} == {
        *("config.json", "manifest.json", "model.safetensors"),
        *("quantization.json", "tokenizer.json"),
    }
    report = json.loads((directory / "quantization.json").read_text())
    assert sorted(report["bytes"]) == sorted(report["bytes_bf16"]) == PARTS
    model = st.load_quantized(directory)
    held = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    assert sum(report["bytes"].values()) == sum(held.values())
    done = finished(run)
    assert done is not None
    # The run's own final evaluation.
    (before,), (after,) = report["loss_before"].values(), report["loss_after"].values()
    assert before == pytest.approx(done.values["loss_last"], rel=1e-5)
    assert after == pytest.approx(before, rel=0.02)
    index = done.values["bytes"]["index"]
    assert report["bytes_bf16"]["sparse index"] == index
    assert sum(report["bytes_bf16"].values()) == done.values["bytes"]["parameters"] // 2 + index
    for words in ("validation loss on", "bytes a nonzero", "quantized model: q"):
        assert words in out
    status, text, err = shell.run("generate", "init_from=q", "prompt='Note 1'", "max_new_tokens=4")
    assert (status, err) == (0, "")
    assert text.startswith("Note 1")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "quantize takes one run and a new directory"),
        (["out=q"], "quantize takes one run and a new directory"),
        (["nowhere", "out=q"], "nowhere is not a run directory"),
        (["nowhere", "out=q", "bits=four"], "bits=four must be a whole number"),
        (["nowhere", "out=q", "bit=4"], r"quantize has no setting 'bit' \(did you mean 'bits'\?\)"),
        (["nowhere", "out=q", "out=p"], "out is given twice"),
    ],
)
def test_words_that_quantize_refuses(words: list[str], message: str, shell: Shell) -> None:
    status, _, err = shell.run("quantize", *words)
    assert status == 2
    assert not words or re.search(message, err)  # without words argparse itself says what is missing
    assert shell.listing() == []
