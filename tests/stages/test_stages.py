"""Pre-training, fine-tuning, soft prompts and generation in sequence, on tensors that can be compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from rich.console import Console
from torch import Tensor

from sparsetrain.data import load_task, prepare
from sparsetrain.errors import UserError
from sparsetrain.models import Transformer
from sparsetrain.parameterization import param_groups
from sparsetrain.runs.checkpoint import load_checkpoint
from sparsetrain.runs.metrics import read_metrics
from sparsetrain.runs.origin import run_tokenizer
from sparsetrain.runs.weights import read_weights
from sparsetrain.sparsity import SparsityPattern, densify
from sparsetrain.stages import (
    FinetuneConfig,
    GenerateConfig,
    PretrainConfig,
    PromptConfig,
    RunResult,
    finetune,
    generate,
    pretrain,
    prompt,
)
from sparsetrain.stages.finetune import Finetuning
from sparsetrain.stages.generate import load_run
from sparsetrain.stages.prompt import initial_prompt
from sparsetrain.training.state import Diverged

Configure = Callable[..., Any]

CPU = torch.device("cpu")


def dense_weight(tensors: dict[str, Tensor], layer: str, shape: tuple[int, int]) -> Tensor:
    pattern = SparsityPattern(shape, tensors[f"{layer}.row_ptr"], tensors[f"{layer}.col"])
    return pattern.mask().to(torch.float32).masked_scatter_(pattern.mask(), tensors[f"{layer}.values"])


def loaded(config: FinetuneConfig) -> Transformer:
    """Return the model that a fine-tuning starts from, before it is made dense."""
    stage = Finetuning(config)
    stage.prepare(stage.origin())
    return stage._load(stage.made_from.tokenizer.vocab_size, CPU)


def test_a_run_directory_holds_exactly_what_is_documented(sparse: RunResult) -> None:
    top = {path.name for path in sparse.directory.iterdir()}
    files = {".lock", "config.yaml", "tokenizer.json", "train_ids.txt", "metrics.jsonl", "result.json"}
    assert top == files | {"backends.json", "checkpoints"}
    kept = {path.name for path in (sparse.directory / "checkpoints").iterdir()}
    assert kept == {"step-00000008", "step-00000012", "latest"}


def test_results_of_pretraining_match_metrics_and_model(sparse: RunResult) -> None:
    metrics = read_metrics(sparse.directory / "metrics.jsonl")
    assert sparse["loss_first"] == metrics[0]["val_loss"]
    assert (sparse["loss_last"], sparse["bits_per_byte"]) == (metrics[-1]["val_loss"], metrics[-1]["bits_per_byte"])
    assert sparse["loss_last"] < sparse["loss_first"]
    weights = read_weights(sparse.directory).model
    nnz = sum(value.numel() for name, value in weights.items() if name.endswith(".values"))
    assert sparse["density"] == pytest.approx(nnz / (2 * 12 * 32 * 32)) == 0.25
    del weights["head.weight"]  # the embedding's
    parameters = sum(value.numel() for value in weights.values() if value.is_floating_point())
    assert sparse["bytes"]["parameters"] == 4 * parameters
    # 6 (nnz + V d + 2 L T d) a token
    assert sparse["flops"]["total"] == 6 * (nnz + 257 * 32 + 2 * 2 * 64 * 32) * sparse["tokens"]
    config = yaml.safe_load((sparse.directory / "config.yaml").read_text())
    about = {"format": 3, "kind": "pretrain", "corpus": sparse["corpus"], "source": None}
    assert config == sparse["config"] | about


def test_the_score_of_a_run_can_be_recomputed_from_its_directory(sparse: RunResult, configure: Configure) -> None:
    model, no_prompt = load_run(sparse.directory, CPU)
    assert no_prompt is None
    corpus = prepare(configure(PretrainConfig).data, progress=False)
    tokens = corpus.validation.window(0, len(corpus.validation))
    nats = count = 0.0
    for start in range(0, len(tokens) - 1, 64):
        piece = tokens[start : start + 65]
        with torch.no_grad():
            nats += F.cross_entropy(model(piece[None, :-1])[0], piece[1:], reduction="sum").item()
        count += len(piece) - 1
    assert sparse["loss_last"] == pytest.approx(nats / count, rel=1e-5)
    size = int((tokens[1:] < 256).sum())  # every token except the end of a document is a byte
    assert sparse["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_masks_do_not_change_in_pretraining_and_follow_the_seed(
    sparse: RunResult, configure: Configure, tmp_path: Path, screen: Console
) -> None:
    checkpoints = sparse.directory / "checkpoints"
    earlier, later = (load_checkpoint(checkpoints, f"step-{step:08d}").model for step in (8, 12))
    masks = [name for name in earlier if name.endswith((".row_ptr", ".col"))]
    assert len(masks) == 2 * 4 * 2
    assert all(torch.equal(earlier[name], later[name]) for name in masks)
    shape = {"budget.steps": 1}
    for name, changes in (("seed", {}), ("mask", {"sparsity.seed": 0}), ("again", {"sparsity.seed": 5})):
        pretrain(configure(PretrainConfig, {**shape, **changes}, run_dir=tmp_path / name, seed=1), screen)
    column = "blocks.0.attn.qkv.col"
    columns = {name: read_weights(tmp_path / name).model[column] for name in ("seed", "mask", "again")}
    assert torch.equal(columns["mask"], later[column])  # only sparsity.seed determines the masks
    assert not torch.equal(columns["seed"], later[column])
    assert not torch.equal(columns["again"], later[column])


def test_dense_finetuning_starts_with_exact_zeros_which_then_train(
    sparse: RunResult, configure: Configure, tmp_path: Path, screen: Console
) -> None:
    config = configure(
        FinetuneConfig, {"loop.checkpoint_every": 1, "loop.keep_last": 99}, run_dir=tmp_path / "tuned",
        init_from=sparse.directory,
    )  # fmt: skip
    result = finetune(config, screen)
    before = read_weights(sparse.directory).model
    after = read_weights(result.directory).model
    assert not any(name.endswith((".values", ".col", ".row_ptr")) for name in after)
    first = load_checkpoint(tmp_path / "tuned" / "checkpoints", "step-00000001").model
    for layer, shape in (("blocks.0.attn.qkv", (96, 32)), ("blocks.1.mlp.down", (32, 128))):
        start = dense_weight(before, layer, shape)
        assert (start == 0).sum() == 0.75 * start.numel()
        # After one warmup step, masked weights are still near zero and the others near their values.
        torch.testing.assert_close(first[f"{layer}.weight"], start, atol=0.01, rtol=0)
        masked = after[f"{layer}.weight"][start == 0]
        assert (masked != 0).float().mean() > 0.99
    assert (result["density"], result["pretrained_density"]) == (1.0, 0.25)
    del after["head.weight"]  # the embedding's
    assert result["trained_parameters"] == sum(value.numel() for value in after.values())
    assert (result["n_test"], result["n_train"], result["overlap_train_test"]) == (20, 36, 0)


def test_the_model_that_dense_finetuning_starts_from_is_exactly_the_sparse_one(
    sparse: RunResult, configure: Configure
) -> None:
    config = configure(FinetuneConfig, init_from=sparse.directory)
    model = loaded(config)
    tokens = torch.arange(40).view(1, 40)
    expected = model(tokens)
    weights = read_weights(sparse.directory).model
    densify(model)
    for layer, shape in (("blocks.0.attn.qkv", (96, 32)), ("blocks.1.mlp.down", (32, 128))):
        assert torch.equal(model.get_submodule(layer).weight, dense_weight(weights, layer, shape))
    torch.testing.assert_close(model(tokens), expected)


def test_sparse_finetuning_keeps_the_masks_exactly(
    sparse: RunResult, configure: Configure, tmp_path: Path, screen: Console
) -> None:
    config = configure(FinetuneConfig, run_dir=tmp_path / "tuned", init_from=sparse.directory, mode="sparse")
    result = finetune(config, screen)
    before, after = read_weights(sparse.directory).model, read_weights(result.directory).model
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == name.endswith((".row_ptr", ".col")), name
    assert (result["density"], result["pretrained_density"]) == (0.25, 0.25)


def test_finetuning_learns_the_answers(
    sparse: RunResult, configure: Configure, tmp_path: Path, screen: Console
) -> None:
    changes = {"budget.steps": 60, "optimizer.lr": 2e-2, "budget.batch_size": 8, "loop.eval_every": 0}
    result = finetune(
        configure(FinetuneConfig, changes, run_dir=tmp_path / "tuned", init_from=sparse.directory), screen
    )
    losses = [record["loss"] for record in read_metrics(result.directory / "metrics.jsonl") if "loss" in record]
    assert losses[-1] < 0.3 * losses[0]
    assert result["ci95"][0] < result["accuracy"] <= result["ci95"][1]


def test_section_roles_share_no_document_with_the_training_text(
    configure: Configure, tmp_path: Path, screen: Console, small_medline: object
) -> None:
    data = {"data.path": None, "data.separator": None, "data.name": "medline"}
    task = {"task.path": None, "task.name": "section_roles", "task.n_test": 30, "task.n_train": 20}
    result = finetune(configure(FinetuneConfig, {**data, **task}, run_dir=tmp_path / "run"), screen)
    assert (result["task"], result["n_test"], result["n_train"]) == ("section_roles", 30, 20)
    assert result["overlap_train_test"] == 0


def test_a_prompt_alone_leaves_the_model_bit_identical(
    sparse: RunResult, configure: Configure, tmp_path: Path, screen: Console
) -> None:
    config = configure(
        PromptConfig, run_dir=tmp_path / "prompt", init_from=sparse.directory, train="prompt", mode="sparse", n_tokens=4
    )
    result = prompt(config, screen)
    before, after = read_weights(sparse.directory).model, read_weights(result.directory)
    learned = after.prompt
    assert learned is not None
    assert before.keys() == after.model.keys()
    assert all(torch.equal(value, after.model[name]) for name, value in before.items())
    assert result["trained_parameters"] == learned.numel() == 4 * 32
    ids = run_tokenizer(sparse.directory).encode(" " + config.words)[:4]
    start = before["embed.weight"][ids]
    assert 0 < (learned - start).abs().max() < 0.1  # it started at the words and moved


def test_a_prompt_with_its_model_changes_both(
    sparse: RunResult, configure: Configure, tmp_path: Path, screen: Console
) -> None:
    config = configure(
        PromptConfig, run_dir=tmp_path / "prompt", init_from=sparse.directory, train="both", mode="dense", n_tokens=2
    )
    trained = read_weights(prompt(config, screen).directory)
    after = trained.model
    before = read_weights(sparse.directory).model
    assert not torch.equal(after["embed.weight"], before["embed.weight"])
    assert (after["blocks.0.attn.qkv.weight"] != 0).float().mean() > 0.99
    assert trained.prompt is not None
    assert trained.prompt.shape == (2, 32)


@pytest.mark.parametrize(
    ("n_tokens", "picked"), [(2, [0, 1]), (5, [0, 1, 2, 3, 0])], ids=["cut to fit", "repeated to fit"]
)
def test_initial_words_are_embedding_rows(
    sparse: RunResult, configure: Configure, n_tokens: int, picked: list[int]
) -> None:
    config = configure(PromptConfig, init_from=sparse.directory, n_tokens=n_tokens, words="abc")
    tokenizer = run_tokenizer(sparse.directory)
    model = loaded(config)
    ids = list(b" abc")
    expected = model.embed.weight[[ids[index] for index in picked]]
    assert torch.equal(initial_prompt(model, tokenizer, config).vectors, expected)


def test_random_prompts_follow_the_seed_at_the_scale_of_the_model(sparse: RunResult, configure: Configure) -> None:
    drawn = []
    for seed in (0, 0, 1):
        config = configure(PromptConfig, init_from=sparse.directory, n_tokens=50, init="random", seed=seed)
        drawn.append(initial_prompt(loaded(config), run_tokenizer(sparse.directory), config).vectors)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].std().item() == pytest.approx(0.02, rel=0.1)


def test_stages_chain_through_every_kind_of_run(
    sparse: RunResult, configure: Configure, tmp_path: Path, screen: Console
) -> None:
    tuned = finetune(configure(FinetuneConfig, run_dir=tmp_path / "tuned", init_from=sparse.directory), screen)
    prompted = prompt(configure(PromptConfig, run_dir=tmp_path / "p", init_from=tuned.directory, n_tokens=2), screen)
    again = finetune(configure(FinetuneConfig, run_dir=tmp_path / "again", init_from=prompted.directory), screen)
    assert again.complete
    start = read_weights(prompted.directory).model
    config = configure(FinetuneConfig, init_from=prompted.directory)
    model = loaded(config)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_pretraining_goes_on_from_a_checkpoint(
    sparse: RunResult, configure: Configure, tmp_path: Path, screen: Console
) -> None:
    result = pretrain(configure(PretrainConfig, run_dir=tmp_path / "more", init_from=sparse.directory), screen)
    assert result["loss_first"] == pytest.approx(sparse["loss_last"], rel=0.02)
    before, after = read_weights(sparse.directory).model, read_weights(result.directory).model
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith(".col"))


def test_supar_rates_follow_the_density_of_the_loaded_checkpoint(sparse: RunResult, configure: Configure) -> None:
    # The configuration has 50 %, the checkpoint 75 %: the masks of the checkpoint and their learning rates apply.
    config = configure(FinetuneConfig, {"sparsity.sparsity": 0.5}, init_from=sparse.directory)
    model = loaded(config)
    groups = param_groups(model, config.parameterization, 1e-3, 0.0, 1e-8)
    qkv = model.get_submodule("blocks.0.attn.qkv").values
    (rate,) = (group["lr"] for group in groups if any(parameter is qkv for parameter in group["params"]))
    assert rate == pytest.approx(1e-3 / (32 / 16 * 0.25))


def test_the_topology_of_a_checkpoint_is_adopted(sparse: RunResult, configure: Configure) -> None:
    config = configure(FinetuneConfig, init_from=sparse.directory, seed=7)  # would draw other masks
    model = loaded(config)
    weights = read_weights(sparse.directory).model
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_generation_is_seeded_and_ends(sparse: RunResult) -> None:
    def text(**settings: Any) -> str:
        return generate(GenerateConfig(init_from=str(sparse.directory), prompt="Note", max_new_tokens=12, **settings))

    assert text(seed=0) == text(seed=0)
    assert text(seed=0, temperature=5.0, top_p=1.0) != text(seed=1, temperature=5.0, top_p=1.0)
    assert text(temperature=0.0).startswith("Note")
    assert generate(GenerateConfig(init_from=str(sparse.directory), max_new_tokens=3)) is not None


def test_greedy_generation_matches_a_loop_of_full_forward_passes(sparse: RunResult) -> None:
    model, _ = load_run(sparse.directory, CPU)
    tokenizer = run_tokenizer(sparse.directory)
    ids = tokenizer.encode("Note 7")
    for _ in range(10):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_id:
            break
    settings = GenerateConfig(str(sparse.directory), prompt="Note 7", max_new_tokens=10, temperature=0.0)
    assert generate(settings) == tokenizer.decode(ids)


def test_generation_uses_the_soft_prompt_of_a_run(
    sparse: RunResult, configure: Configure, tmp_path: Path, screen: Console
) -> None:
    changes = {"optimizer.lr": 0.5, "budget.steps": 20}
    config = configure(
        PromptConfig, changes, run_dir=tmp_path / "p", init_from=sparse.directory, train="prompt", mode="sparse"
    )
    result = prompt(config, screen)
    settings = {
        "init_from": str(result.directory),
        "prompt": "Note",
        "max_new_tokens": 12,
        "temperature": 0.0,
        "cue": False,
    }
    plain = {**settings, "init_from": str(sparse.directory)}
    assert generate(GenerateConfig(**settings, soft_prompt=False)) == generate(GenerateConfig(**plain))
    model, learned = load_run(result.directory, CPU)
    assert learned is not None
    with_prompt = model.generate(
        torch.tensor([list(b"Note")]), 12, 0.0, 1.0, stop_token=256, prompt=learned
    )  # fmt: skip
    assert generate(GenerateConfig(**settings)) == run_tokenizer(result.directory).decode(with_prompt[0].tolist())


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"device": "tpu"}, "device='tpu' is not one of auto, cpu, cuda"),
        ({"init_from": None}, "init_from is missing"),
    ],
)
def test_generation_settings_out_of_range_are_named(sparse: RunResult, changes: dict[str, Any], allowed: str) -> None:
    with pytest.raises(UserError, match=allowed):
        generate(GenerateConfig(**{"init_from": str(sparse.directory), **changes}))


def test_finetuning_that_diverges_says_so(configure: Configure, tmp_path: Path, screen: Console) -> None:
    changes = {"optimizer.lr": 1e25, "optimizer.clip": 0.0, "schedule.warmup": 0.0, "budget.steps": 1}
    with pytest.raises(Diverged, match="finetune: val_accuracy nan after step 1"):
        finetune(configure(FinetuneConfig, changes, run_dir=tmp_path / "run"), screen)


def test_the_documented_task_is_loaded(configure: Configure) -> None:
    task = load_task(configure(FinetuneConfig).task)
    assert (len(task.train), len(task.validation), len(task.test)) == (36, 4, 20)


def test_a_prompt_for_a_frozen_model_keeps_its_masks(
    sparse: RunResult, configure: Configure, tmp_path: Path, screen: Console
) -> None:
    frozen = prompt(configure(PromptConfig, run_dir=tmp_path / "a", init_from=sparse.directory), screen)
    assert frozen["density"] == 0.25
    both = prompt(configure(PromptConfig, run_dir=tmp_path / "b", init_from=sparse.directory, train="both"), screen)
    assert both["density"] == 1.0
