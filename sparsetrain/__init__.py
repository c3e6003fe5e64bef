"""Train language models whose weights are unstructured sparse from the first step."""

import sparsetrain.process  # noqa: F401 - first of all: see there
from sparsetrain.calls import (
    adapt,
    calibrate,
    evaluate,
    export_hf,
    finetune,
    generate,
    import_hf,
    load,
    pretrain,
    prompt,
)
from sparsetrain.cost.cluster.parallelism import Parallelism
from sparsetrain.cost.flop_ledger import flops
from sparsetrain.cost.hardware import Machine
from sparsetrain.cost.ledger import Ledger
from sparsetrain.cost.simulate import Estimate, simulate
from sparsetrain.cost.step_memory import StepMemory, step_memory
from sparsetrain.data import Mixture, fill_in_the_middle, register_source, register_task
from sparsetrain.data.vocabulary import extend_tokenizer
from sparsetrain.errors import UserError
from sparsetrain.gradients.modules import register_example_gradients
from sparsetrain.gradients.per_example import per_example_norms
from sparsetrain.interop import installed
from sparsetrain.interop.callbacks import lightning_callback, trainer_callback
from sparsetrain.interop.peft_prompt import load_peft_prompt, save_peft_prompt
from sparsetrain.models import ModelConfig, SoftPrompt, Transformer, alibi_slopes
from sparsetrain.optim import ema_coefficients, register_schedule, timescale, weight_decay_for
from sparsetrain.parameterization import Parameterization, decay_groups, follow_density, param_groups, parameterize
from sparsetrain.quantization import quantize
from sparsetrain.runs.quantized import load_quantized, save_quantized
from sparsetrain.runs.result import RunResult
from sparsetrain.scaling.law import Law, PowerLaw
from sparsetrain.scaling.noise import NoiseScale
from sparsetrain.scaling.power_law import fit_power_law
from sparsetrain.scaling.published import batch_opt, tau_opt
from sparsetrain.sparsity import (
    GMP,
    SET,
    AveragedModel,
    Backend,
    EvolutionConfig,
    MaskManager,
    Phase,
    RigL,
    Rule,
    SparseLinear,
    SparseMultiheadAttention,
    SparsityConfig,
    SparsityGroup,
    SparsityPattern,
    Static,
    VariableSparsity,
    densify,
    prepared,
    register_backend,
    register_pattern,
    register_rule,
    sparse_linear,
    sparsify,
    summary,
)
from sparsetrain.vocabulary import extend_embeddings

__version__ = "0.1.0"

__all__ = [
    "GMP",
    "SET",
    "AveragedModel",
    "Backend",
    "Estimate",
    "EvolutionConfig",
    "Law",
    "Ledger",
    "Machine",
    "MaskManager",
    "Mixture",
    "ModelConfig",
    "NoiseScale",
    "Parallelism",
    "Parameterization",
    "Phase",
    "PowerLaw",
    "RigL",
    "Rule",
    "RunResult",
    "SoftPrompt",
    "SparseLinear",
    "SparseMultiheadAttention",
    "SparsityConfig",
    "SparsityGroup",
    "SparsityPattern",
    "Static",
    "StepMemory",
    "Transformer",
    "UserError",
    "VariableSparsity",
    "adapt",
    "alibi_slopes",
    "batch_opt",
    "calibrate",
    "decay_groups",
    "densify",
    "ema_coefficients",
    "evaluate",
    "export_hf",
    "extend_embeddings",
    "extend_tokenizer",
    "fill_in_the_middle",
    "finetune",
    "fit_power_law",
    "flops",
    "follow_density",
    "generate",
    "import_hf",
    "lightning_callback",
    "load",
    "load_peft_prompt",
    "load_quantized",
    "param_groups",
    "parameterize",
    "per_example_norms",
    "prepared",
    "pretrain",
    "prompt",
    "quantize",
    "register_backend",
    "register_example_gradients",
    "register_pattern",
    "register_rule",
    "register_schedule",
    "register_source",
    "register_task",
    "save_peft_prompt",
    "save_quantized",
    "simulate",
    "sparse_linear",
    "sparsify",
    "step_memory",
    "summary",
    "tau_opt",
    "timescale",
    "trainer_callback",
    "weight_decay_for",
]

installed.install()
