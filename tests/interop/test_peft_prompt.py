"""Soft prompts to and from peft. The oracle is peft's prompt tuning on the exported model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, PromptTuningConfig, get_peft_model
from rich.console import Console
from tiny_models import VOCAB, gpt2
from transformers import AutoModelForCausalLM

import sparsetrain as st
from sparsetrain.data import Tokenizer
from sparsetrain.interop.hf import ExportConfig, export_run, write_model
from sparsetrain.models import Prompted
from sparsetrain.stages import PromptConfig, prompt
from sparsetrain.stages.generate import load_run

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
BYTES = Tokenizer.bytes()
RULES = st.Parameterization.supar_completep(16, 0.5, 1, alpha=0.5, alpha_in=2.0, alpha_out=3.0)


def transformer(**options: object) -> st.Transformer:
    model = st.Transformer(st.ModelConfig(32, 2, 2, BYTES.vocab_size, max_context=32, seed=0, **options)).eval()
    model.parameterize(RULES)
    return model


def front(model: st.Transformer, n: int = 3) -> st.SoftPrompt:
    return st.SoftPrompt.from_embeddings(torch.randn(n, model.config.d_model), front=True)


@pytest.mark.parametrize(
    "options", [{"positions": "learned"}, {"positions": "rope", "mlp": "swiglu", "norm": "rmsnorm"}]
)
def test_peft_reads_a_saved_prompt_of_an_exported_model(options: dict[str, str], tmp_path: Path) -> None:
    model = transformer(sparsity=0.5, **options)
    vectors = front(model)
    write_model(model, BYTES, tmp_path / "model", verify=False)
    st.save_peft_prompt(vectors, tmp_path / "prompt", model, base=str(tmp_path / "model"))
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "prompt")
    tokens = torch.randint(0, 256, (2, 9))
    with torch.no_grad():
        ours = model.logits(model.hidden(embeddings=vectors.attach(model.embed_tokens(tokens))))
        torch.testing.assert_close(ours, peft(tokens).logits, rtol=1e-4, atol=1e-5)
    slots = torch.full((2, 12), -1)
    slots[:, 5:8] = torch.arange(3)  # in the middle, from where they go to the front
    padded = torch.cat((tokens[:, :5], torch.zeros(2, 3, dtype=torch.int64), tokens[:, 5:]), dim=1)
    with torch.no_grad():
        assert torch.equal(Prompted(model, vectors)(padded, slots=slots), ours)


def test_a_prompt_that_peft_trained_comes_back(tmp_path: Path) -> None:
    base = gpt2()
    peft = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    peft.save_pretrained(tmp_path / "theirs")
    found = st.load_peft_prompt(tmp_path / "theirs")
    assert found.front
    assert torch.equal(found.vectors, peft.prompt_encoder["default"].embedding.weight)
    st.save_peft_prompt(found, tmp_path / "ours", base)
    again = PeftModel.from_pretrained(gpt2(), tmp_path / "ours")
    assert torch.equal(again.prompt_encoder["default"].embedding.weight, found.vectors)
    tokens = torch.randint(0, VOCAB, (1, 7))
    embeddings = found.attach(base.get_input_embeddings()(tokens))
    with torch.no_grad():
        torch.testing.assert_close(base(inputs_embeds=embeddings).logits, peft.eval()(tokens).logits)


def test_the_prompt_stage_trains_in_front_and_what_peft_reads_scores_alike(
    trained: object, configure: object, tmp_path: Path, screen: Console
) -> None:
    start = trained()  # type: ignore[operator]
    config = configure(  # type: ignore[operator]
        PromptConfig, run_dir=tmp_path / "run", init_from=start, n_tokens=3, position="front", init="random"
    )
    result = prompt(config, screen)
    model, found = load_run(Path(result.directory), torch.device("cpu"))
    assert found is not None
    assert found.front
    exported = export_run(ExportConfig(result.directory, str(tmp_path / "model")), screen)
    assert "soft prompt of 3 vectors in front of the text: prompt/ is an adapter of peft" in exported.notes[-1]
    peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "model" / "prompt")
    tokens = torch.tensor([BYTES.encode("Note 3: placebo")])
    expected = peft.generate(input_ids=tokens, max_new_tokens=8, do_sample=False, eos_token_id=None)
    ours = model.generate(tokens, 8, temperature=0.0, prompt=found)
    assert torch.equal(ours, expected)


def test_a_prompt_between_cannot_be_saved_for_peft(tmp_path: Path) -> None:
    with pytest.raises(st.UserError, match=r"between source and answer; train it with position=front"):
        st.save_peft_prompt(st.SoftPrompt(2, 32), tmp_path, gpt2())
    with pytest.raises(st.UserError, match="vectors of width 16; the model has 32"):
        st.save_peft_prompt(st.SoftPrompt(2, 16, front=True), tmp_path, gpt2())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type='LORA' is no soft prompt; allowed are PROMPT_TUNING, P_TUNING"),
        ({"num_transformer_submodules": 2}, "encoder and decoder"),
        ({"num_virtual_tokens": 5}, "has 2 rows, and adapter_config.json num_virtual_tokens=5"),
        ({"prompt_embeddings": torch.zeros(2)}, "must be a matrix of finite numbers"),
        ({"prompt_embeddings": torch.full((2, 32), torch.nan)}, "must be a matrix of finite numbers"),
        ({"weights": None}, "adapter_model.bin is a pickle, which is not read"),
        ({"weights": b"no"}, "cannot be read as .safetensors"),
    ],
)
def test_what_holds_no_soft_prompt_gets_one_line(change: dict[str, object], message: str, tmp_path: Path) -> None:
    st.save_peft_prompt(st.SoftPrompt(2, 32, front=True), tmp_path, gpt2())
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    if "prompt_embeddings" in change:
        safetensors.torch.save_file(change, weights)
    elif "weights" in change:
        weights.rename(tmp_path / "adapter_model.bin")
        if change["weights"] is not None:
            weights.write_bytes(change["weights"])
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(st.UserError, match=message):
        st.load_peft_prompt(tmp_path)
