"""The verbs as functions of Python.

Each imports the upper floors of the library only when it is called, so that ``import sparsetrain`` stays fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsetrain.cost.hardware import Machine

if TYPE_CHECKING:
    from sparsetrain.interop.hf import Exported
    from sparsetrain.runs.result import RunResult
    from sparsetrain.stages.loaded import Loaded


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


def export_hf(init_from: str, output: str, **settings: Any) -> Exported:
    """Write the model of a run as a directory that ``AutoModelForCausalLM.from_pretrained`` loads; ``export`` does so.

    Args:
        init_from: the run directory.
        output: the directory to write.
        settings: of the verb ``export``: ``layout``, ``verify``.

    Returns:
        What was written: ``layout``, ``parameters``, ``nonzeros``, the largest ``difference`` of a logit, ``notes``.

    Raises:
        UserError: there is no such run, no layout holds its model, or the directory is taken.
    """
    from sparsetrain.interop.hf import ExportConfig, export_run  # with the stages, which import much

    return export_run(ExportConfig(init_from, output, **settings))


def import_hf(source: str, run_dir: str, **settings: Any) -> RunResult:
    """Make a run directory of a Hugging Face model, which every verb takes as ``init_from``; ``import`` does so.

    Args:
        source: a directory with ``config.json`` and ``model.safetensors``, or a name on the hub.
        run_dir: the run directory to write.
        settings: of the verb ``import``: ``tokenizer``, ``masks``, ``sparsity``, ``seed``, ``revision``, ``verify``.

    Raises:
        UserError: the source cannot be read, or our transformers do not compute what it computes.
    """
    from sparsetrain.interop.hf_import import ImportConfig, import_run  # with the stages, which import much

    return import_run(ImportConfig(source, run_dir, **settings))


def _called(verb: str, settings: Mapping[str, Any] | None, keywords: Mapping[str, Any], quiet: bool = False) -> Any:
    from sparsetrain.cli.calls import call  # with Hydra, which imports much

    return call(verb, settings, keywords, quiet)


def pretrain(settings: Mapping[str, Any] | None = None, /, *, quiet: bool = False, **keywords: Any) -> RunResult:
    """Train a language model on text, dense or sparse from the first step, and return its result.

    The call makes the run that ``sparsetrain pretrain`` makes with the same settings, with the same bits. A run that
    exists is resumed, or read if it is finished:

    ```python
    run = st.pretrain(data="notes.txt", model={"d_model": 64}, sparsity=0.75, steps=200, lr=2e-3, run_dir="runs/notes")
    run["bits_per_byte"], run.directory
    ```

    Args:
        settings: settings by their dotted names: ``{"budget.steps": 200}``.
        quiet: print nothing.
        keywords: settings by their last part (``steps=200``), sections as dicts (``model={"d_model": 64}``), and
            presets by name (``model="demo"``, ``sparsity="rigl"``). ``sparsity`` also takes a number, and ``data`` a
            path.

    Raises:
        UserError: a setting is unknown, ambiguous, given twice or refused, or the input cannot be used.
    """
    found: RunResult = _called("pretrain", settings, keywords, quiet)
    return found


def adapt(settings: Mapping[str, Any] | None = None, /, *, quiet: bool = False, **keywords: Any) -> RunResult:
    """Adapt a trained model to another language, and return its result; see `pretrain` for the arguments.

    Raises:
        UserError: a setting is unknown, ambiguous, given twice or refused, or the input cannot be used.
    """
    found: RunResult = _called("adapt", settings, keywords, quiet)
    return found


def finetune(settings: Mapping[str, Any] | None = None, /, *, quiet: bool = False, **keywords: Any) -> RunResult:
    """Train a model on a labelled task, and return its result; see `pretrain` for the arguments.

    Raises:
        UserError: a setting is unknown, ambiguous, given twice or refused, or the input cannot be used.
    """
    found: RunResult = _called("finetune", settings, keywords, quiet)
    return found


def prompt(settings: Mapping[str, Any] | None = None, /, *, quiet: bool = False, **keywords: Any) -> RunResult:
    """Learn a soft prompt for a task, and return its result; see `pretrain` for the arguments.

    Raises:
        UserError: a setting is unknown, ambiguous, given twice or refused, or the input cannot be used.
    """
    found: RunResult = _called("prompt", settings, keywords, quiet)
    return found


def evaluate(settings: Mapping[str, Any] | None = None, /, *, quiet: bool = False, **keywords: Any) -> RunResult:
    """Measure a trained model on text and probes, and return its result; see `pretrain` for the arguments.

    Raises:
        UserError: a setting is unknown, ambiguous, given twice or refused, or the input cannot be used.
    """
    found: RunResult = _called("evaluate", settings, keywords, quiet)
    return found


def generate(settings: Mapping[str, Any] | None = None, /, **keywords: Any) -> str:
    """Return a text that the model of a run continues: ``st.generate(init_from=RUN_DIR, prompt="The aim")``.

    Raises:
        UserError: a setting is unknown, ambiguous, given twice or refused, or the input cannot be used.
    """
    found: str = _called("generate", settings, keywords)
    return found


def load(run_dir: str | Path, device: str = "cpu", soft_prompt: bool = True) -> Loaded:
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
