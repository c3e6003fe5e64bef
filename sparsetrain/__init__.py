"""Train language models whose weights are unstructured sparse from the first step."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import sparsetrain.process  # noqa: F401 - first of all: see there
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
    register_backend,
    register_pattern,
    register_rule,
    sparse_linear,
    sparsify,
    summary,
)
from sparsetrain.vocabulary import extend_embeddings

if TYPE_CHECKING:
    from sparsetrain.stages.loaded import Loaded

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
    "alibi_slopes",
    "batch_opt",
    "calibrate",
    "decay_groups",
    "densify",
    "ema_coefficients",
    "extend_embeddings",
    "extend_tokenizer",
    "fill_in_the_middle",
    "fit_power_law",
    "flops",
    "follow_density",
    "lightning_callback",
    "load",
    "load_peft_prompt",
    "load_quantized",
    "param_groups",
    "parameterize",
    "per_example_norms",
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


def calibrate(
    budget_seconds: float = 120.0, threads: Sequence[int] | None = None, dtypes: Sequence[str] = ("float32",)
) -> Machine:
    """Measure this machine, save it as ``this`` in the cache, and return it; `simulate` then predicts its step times.

    Nothing else should run meanwhile. Numbers of threads are set for the measurement and restored.

    Args:
        budget_seconds: about how long to measure, at least 20.
        threads: thread counts to measure; None for one thread and all cores.
        dtypes: types of products: ``float32``, and ``bfloat16`` by autocast.

    Raises:
        UserError: an argument is out of range, or the cache has no room.
    """
    from sparsetrain.bench.calibrate import calibrate as measured  # with the benchmarks, which import much

    return measured(budget_seconds, threads, dtypes)


def load(run_dir: str | Path, device: str = "cpu", soft_prompt: bool = True) -> "Loaded":
    """Load a run for use, from its directory alone: its text, its task's data and earlier runs are not needed.

    The result has ``model`` (``model(ids)`` maps ids ``[batch, tokens]`` to logits ``[batch, tokens, vocabulary]``),
    ``tokenizer`` (``encode`` returns a list of ids), ``task`` (how the run's task asks, or None) and ``prompt`` (its
    soft prompt, or None). For a run on a task, ``predict(rows)`` labels texts, or rows with the columns of the task;
    ``generate(text)`` continues a text.

    Args:
        run_dir: the directory of a run, of a stage of a pipeline, or of a quantized model.
        device: ``auto``, ``cpu`` or ``cuda``.
        soft_prompt: whether to load the run's soft prompt, if it has one.

    Raises:
        UserError: there is no such run, it has no weights, or a file of it is damaged.
    """
    from sparsetrain.stages.loaded import load as loaded  # with the stages, which import much

    return loaded(run_dir, device, soft_prompt)
