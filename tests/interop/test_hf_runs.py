"""`sparsetrain export` and `import`: runs to directories of Hugging Face and back, by commands; transformers judges."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tokenizers
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from shell import Shell
from tokenizers import models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from sparsetrain.data import Tokenizer
from sparsetrain.errors import UserError
from sparsetrain.interop.hf import ExportConfig, export_run, write_model
from sparsetrain.interop.hf_check import quiet, same_logits, sample
from sparsetrain.interop.hf_import import ImportConfig, import_run
from sparsetrain.interop.hf_tokenizer import tokenizer_files
from sparsetrain.runs.origin import Origin
from sparsetrain.runs.result import load_result
from sparsetrain.sparsity import SparsityConfig, sparse_layers
from sparsetrain.stages import PretrainConfig, PromptConfig, pretrain, prompt
from sparsetrain.stages.generate import load_run
from sparsetrain.studies.sweep import read_sweep

Configure = Callable[..., Any]
Trained = Callable[..., Path]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 as transformers saves it, without a tokenizer."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=2, **ends))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    place = tmp_path_factory.mktemp("gpt2") / "model"
    with quiet():
        model.save_pretrained(place)
    return place


def test_an_exported_run_continues_a_text_as_the_run_does_and_comes_back(trained: Trained, shell: Shell) -> None:
    run = trained()
    status, out, err = shell.run("export", f"init_from={run}", "format=hf", "output=out")
    assert status == 0, err
    assert "exported: out, MptForCausalLM" in out
    text = "Note 7: placebo"
    ask = [f"prompt={text}", "temperature=0", "max_new_tokens=60"]  # beyond the trained length of 64 tokens
    _, expected, _ = shell.run("generate", f"init_from={run}", *ask)
    with quiet():
        theirs = AutoModelForCausalLM.from_pretrained("out")
    tokenizer = AutoTokenizer.from_pretrained("out")
    written = theirs.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=60, do_sample=False)
    assert tokenizer.decode(written[0], skip_special_tokens=True) == expected.removesuffix("\n")

    status, out, err = shell.run("import", "source=out", "run_dir=back")
    assert status == 0, err
    assert "run directory: back" in out
    assert shell.run("generate", "init_from=back", *ask)[1] == expected
    before, _ = load_run(run, CPU)
    after, _ = load_run(Path("back"), CPU)
    kept = dict(sparse_layers(after))
    assert all(kept[name].pattern.equals(layer.pattern) for name, layer in sparse_layers(before))
    ids = sample(Tokenizer.bytes(), 64)
    torch.testing.assert_close(after(ids), before(ids), atol=1e-5, rtol=1e-5)
    result = load_result(Path("back/result.json"))
    assert (result["status"], result["steps"], result["density"]) == ("complete", 0, pytest.approx(0.25, abs=0.01))
    assert "already done" in shell.run("import", "source=out", "run_dir=back")[1]
    with pytest.raises(UserError, match="no finished pre-training run"):
        read_sweep([Path("back")])  # nothing was trained


def test_a_run_from_an_imported_model_trains_and_says_that_its_text_is_unknown(
    gpt2: Path, configure: Configure, screen: Console, tmp_path: Path
) -> None:
    plan = SparsityConfig(sparsity=0.5, pattern="magnitude")
    start = tmp_path / "start"
    import_run(ImportConfig(str(gpt2), str(start), tokenizer="bytes", sparsity=plan), screen)
    model, _ = load_run(start, CPU)
    theirs = GPT2LMHeadModel.from_pretrained(gpt2)
    for number, block in enumerate(theirs.transformer.h):
        weight = block.mlp.c_fc.weight.T
        layer = dict(sparse_layers(model))[f"blocks.{number}.mlp.up"]
        largest = weight.abs().flatten().topk(weight.numel() // 2).values[-1]
        assert torch.equal(layer.pattern.mask(), weight.abs() >= largest)

    settings = {"model": {}, "parameterization.scheme": "sp", "budget.steps": 2, "data.context": 32}
    values = {**settings, "model": load_result(start / "result.json")["config"]["model"]}
    asked = configure(PromptConfig, values, init_from=start, run_dir=tmp_path / "asked")
    found = prompt(asked, screen)
    assert found["overlap_train_test"] is None
    assert "the text of the imported model is unknown" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert not Origin.of_run(str(tmp_path / "asked")).knows_its_text

    exported = export_run(ExportConfig(str(tmp_path / "asked"), str(tmp_path / "out")), screen)
    assert exported.layout == "gpt2"
    assert any(f"a soft prompt of {asked.n_tokens} vectors" in note for note in exported.notes)
    assert "soft prompt" in (tmp_path / "out" / "README.md").read_text()


def test_a_pretraining_makes_a_dense_run_sparse_and_keeps_a_sparse_one(
    trained: Trained, configure: Configure, screen: Console, tmp_path: Path, shell: Shell
) -> None:
    dense, sparse = trained({"sparsity.sparsity": 0.0}), trained()
    before, _ = load_run(dense, CPU)
    changes = {"sparsity": {"sparsity": 0.5, "pattern": "magnitude"}, "budget.steps": 6}
    run = tmp_path / "pruned"
    pretrain(configure(PretrainConfig, changes, init_from=dense, run_dir=run), screen)
    layers = dict(sparse_layers(load_run(run, CPU)[0]))
    assert len(layers) == 8
    weight = before.blocks[1].mlp.up.weight
    largest = weight.abs().flatten().topk(weight.numel() // 2).values[-1]
    assert torch.equal(layers["blocks.1.mlp.up"].pattern.mask(), weight.abs() >= largest)

    words = ["budget.steps=2", "budget.batch_size=2", "data.tokenizer=bytes", "data.context=32", shell.tiny[-1]]
    status, out, err = shell.run("pretrain", f"init_from={dense}", "sparsity.sparsity=0.5", "run_dir=half", *words)
    assert status == 0, err
    assert "hidden density 0.5," in out
    line = shell.refused("pretrain", f"init_from={sparse}", "sparsity.sparsity=0.5", "run_dir=other", *words)
    assert "its checkpoint has another shape: sparsity.sparsity=0.5" in line


def test_masks_come_from_the_file_or_from_zeros(trained: Trained, screen: Console, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_run(ExportConfig(str(trained()), str(out)), screen)

    def layers(**settings: Any) -> dict[str, Any]:
        name = "-".join(map(str, settings.values())) + str(len(list(tmp_path.iterdir())))
        import_run(ImportConfig(str(out), str(tmp_path / name), verify=False, **settings), screen)
        return dict(sparse_layers(load_run(tmp_path / name, CPU)[0]))

    before = dict(sparse_layers(load_run(trained(), CPU)[0]))
    assert layers(masks="none") == {}
    for found in (layers(masks="auto"), layers(masks="zeros")):
        assert all(found[name].pattern.equals(layer.pattern) for name, layer in before.items())
    # Another library's section names no file: the zeros of the weights are the masks.
    content = json.loads((out / "config.json").read_text())
    content["sparsity_config"] = {"format": "dense", "global_sparsity": 0.7}
    (out / "config.json").write_text(json.dumps(content))
    assert layers().keys() == before.keys()


def test_a_mask_that_would_remove_weights_is_refused(trained: Trained, tmp_path: Path, screen: Console) -> None:
    out = tmp_path / "out"
    export_run(ExportConfig(str(trained()), str(out)), screen)
    tensors = load_file(out / "model.safetensors")
    tensors["transformer.blocks.0.ffn.up_proj.weight"] += 1.0
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weights of blocks.0.mlp.up are not zero where its mask file has zeros"):
        import_run(ImportConfig(str(out), str(tmp_path / "run")), screen)
    assert not (tmp_path / "run").exists()


def test_a_difference_of_logits_is_refused(trained: Trained, tmp_path: Path) -> None:
    first, _ = load_run(trained(), CPU)
    other, _ = load_run(trained({"sparsity.sparsity": 0.0}), CPU)
    write_model(first, Tokenizer.bytes(), tmp_path / "out")
    with pytest.raises(UserError, match=r"said: they differ by .*, with logits up to .*; anyway"):
        same_logits(other, tmp_path / "out", sample(Tokenizer.bytes(), 64), "said", "anyway")


def test_without_transformers_it_is_written_and_said(
    trained: Trained, tmp_path: Path, screen: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name == "transformers" else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    found = export_run(ExportConfig(str(trained()), str(tmp_path / "out")), screen)
    assert found.difference is None
    assert "not compared" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert import_run(ImportConfig(str(tmp_path / "out"), str(tmp_path / "run")), screen).complete


def test_what_cannot_be_exported_is_one_line(trained: Trained, shell: Shell) -> None:
    run = trained()
    taken = Path("taken")
    taken.mkdir()
    (taken / "file").write_text("mine")
    assert shell.run("quantize", str(run), "out=quantized")[0] == 0
    for words, message in (
        (["output=out"], "init_from is missing"),
        ([f"init_from={run}"], "output is missing"),
        ([f"init_from={run}", "output=taken"], "output=taken exists and is not empty"),
        ([f"init_from={run}", "output=out", "format=onnx"], "format='onnx' is not one of hf"),
        (
            [f"init_from={run}", "output=out", "layout=llama"],
            "layout=llama cannot hold this model: it needs positions=",
        ),
        (["init_from=nowhere", "output=out"], "nowhere"),
        (["init_from=quantized", "output=out"], "init_from=quantized is quantized"),
        ([f"init_from={run}", "output=out", "model.positions_scale=2"], "mpt needs positions_scale=1"),
    ):
        assert message in shell.refused("export", *words)


def test_what_cannot_be_imported_is_one_line(gpt2: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(gpt2, "pickled")
    Path("pickled/model.safetensors").unlink()
    Path("pickled/pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    shutil.copytree(gpt2, "damaged")
    Path("damaged/model.safetensors").write_bytes(b"{")
    shutil.copytree(gpt2, "small")
    content = json.loads(Path("small/config.json").read_text())
    Path("small/config.json").write_text(json.dumps(content | {"n_embd": 64}))
    Path("nothing").mkdir()

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("the hub cannot be reached\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for words, message in (
        (["run_dir=run"], "source is missing"),
        ([f"source={gpt2}"], "run_dir is missing"),
        (["source=no/such/place", "run_dir=run"], "no such directory, nor a name OWNER/NAME"),
        (["source=owner/name", "run_dir=run"], "the Hugging Face hub did not give it: the hub cannot be reached"),
        (["source=nothing", "run_dir=run"], "it has no config.json"),
        (["source=pickled", "run_dir=run"], "pytorch_model.bin is a pickle, which can run any code"),
        (["source=damaged", "run_dir=run", "tokenizer=bytes"], "cannot be read as .safetensors"),
        (["source=small", "run_dir=run", "tokenizer=bytes"], "config.json needs [257, 64]"),
        ([f"source={gpt2}", "run_dir=run"], "its tokenizer cannot be used"),
        ([f"source={gpt2}", "run_dir=run", "masks=some"], "masks='some' is not one of auto, zeros, none"),
    ):
        assert message in shell.refused("import", *words), words


def test_a_word_piece_tokenizer_comes_along_without_what_adds_tokens(tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = ["the patients were treated with placebo"] * 3
    special = ["[UNK]", "[CLS]", "[SEP]"]
    inner.train_from_iterator(words, trainers.WordPieceTrainer(vocab_size=90, special_tokens=special))
    inner.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    inner.save(str(tmp_path / "pieces.json"))
    with pytest.warns(UserWarning, match="may not give a text back"):
        ours = Tokenizer.load(tmp_path / "pieces.json", "[SEP]")
    tokenizer_files(ours, tmp_path, 64)
    (tmp_path / "config.json").write_text('{"model_type": "mpt"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "the placebo patients [SEP] were"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.eos_token_id == ours.eos_id
    with pytest.warns(UserWarning, match="may not give a text back"):
        assert Tokenizer.load(tmp_path).eos_token == "[SEP]"
