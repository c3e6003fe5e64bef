"""The verbs of the command line, each in one row: help, parsing, schemas and what runs follow from this table.

A new verb is a row here and its function, and for one with settings its dataclass and ``conf/VERB.yaml``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from sparsetrain.errors import UserError, nearest


def named(place: str) -> Any:
    """Return what ``"package.module:name"`` names, whose module is imported only now."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class Verb:
    """One verb. Functions and classes are given as ``"package.module:name"``, so that the table imports none of them.

    Args:
        about: one line of help. examples: commands that work.
        run: what it does. With settings it is called with their dataclass, with ``parser`` with the parsed words; it
            may return an exit status, or a `stages.RunResult`, which is summarised.
        configuration: the dataclass of its settings, whose defaults ``conf/VERB.yaml`` completes.
        parser: for a verb that takes other words than settings, a function that adds them to an ``ArgumentParser``.
        inherits: sections of settings that it takes from the run ``init_from`` unless they are given.
        cost: what a multirun of it will take, from the configurations of the points; said before the first of them.
    """

    about: str
    run: str
    examples: Sequence[str]
    configuration: str | None = None
    parser: str | None = None
    inherits: Sequence[str] = ()
    cost: str | None = None

    def __post_init__(self) -> None:
        if (self.configuration is None) == (self.parser is None):
            raise ValueError("a verb has either a configuration or a parser")

    def kind(self) -> type:
        """Return the dataclass of the settings."""
        assert self.configuration is not None
        found: type = named(self.configuration)
        return found

    def add_words(self, parser: argparse.ArgumentParser) -> None:
        """Add to ``parser`` what the verb takes in place of settings."""
        assert self.parser is not None
        add: Callable[[argparse.ArgumentParser], None] = named(self.parser)
        add(parser)


VERBS: dict[str, Verb] = {
    "data": Verb(
        about="Download or read a corpus, train its tokenizer, write its token files.",
        configuration="sparsetrain.cli.start:DataVerbConfig",
        run="sparsetrain.cli.start:data",
        examples=["sparsetrain data", "sparsetrain data data.path=notes.txt data.vocab_size=2048"],
    ),
    "pretrain": Verb(
        about="Train a language model on text, dense or sparse from the first step.",
        configuration="sparsetrain.stages:PretrainConfig",
        run="sparsetrain.stages:pretrain",
        examples=[
            "sparsetrain pretrain model=demo sparsity.sparsity=0.75 budget.tokens=2000000",
            "sparsetrain pretrain data.path=notes.txt model.d_model=64 budget.steps=200 run_dir=runs/notes",
            "sparsetrain pretrain -m sparsity.sparsity=0,0.5,0.75 optimizer.lr=1e-3,2e-3,4e-3",
        ],
        inherits=["parameterization"],
        cost="sparsetrain.stages.estimate:sweep_cost",
    ),
    "finetune": Verb(
        about="Train a pre-trained model (or a fresh one) on a labelled task, dense or with its masks.",
        configuration="sparsetrain.stages:FinetuneConfig",
        run="sparsetrain.stages:finetune",
        examples=[
            "sparsetrain finetune init_from=RUN_DIR task=section_roles",
            "sparsetrain finetune init_from=RUN_DIR task=pubmedqa task.path=PUBMEDQA_DIR mode=sparse",
        ],
        inherits=["parameterization", "data"],
    ),
    "prompt": Verb(
        about="Learn a soft prompt for a task, alone or together with the model.",
        configuration="sparsetrain.stages:PromptConfig",
        run="sparsetrain.stages:prompt",
        examples=[
            "sparsetrain prompt init_from=RUN_DIR n_tokens=16",
            "sparsetrain prompt init_from=RUN_DIR train=both",
        ],
        inherits=["parameterization", "data"],
    ),
    "pipeline": Verb(
        about="Pre-train, fine-tune and soft-prompt at several sparsities, and compare them in a report.",
        configuration="sparsetrain.stages:PipelineConfig",
        run="sparsetrain.cli.start:pipeline",
        examples=[
            "sparsetrain pipeline experiment=demo",
            "sparsetrain pipeline experiment=demo 'pipeline.arms={sparsity.sparsity:[0,0.5,0.75]}'",
            "sparsetrain pipeline experiment=demo pipeline.stages.finetune.budget.epochs=3",
        ],
    ),
    "generate": Verb(
        about="Continue a text with the model of a run.",
        configuration="sparsetrain.stages:GenerateConfig",
        run="sparsetrain.cli.start:generate",
        examples=["sparsetrain generate init_from=RUN_DIR prompt='The aim of this study was'"],
    ),
    "coord-check": Verb(
        about="Check that activations and updates keep their scale over sparsity, width or depth.",
        configuration="sparsetrain.studies.coordinates:CoordinatesConfig",
        run="sparsetrain.studies.coordinates:coord_check",
        examples=[
            "sparsetrain coord-check",
            "sparsetrain coord-check check=depth parameterization=completep parameterization.base_layers=2 "
            "check.seeds=2",
            "sparsetrain coord-check check=width parameterization=mup optimizer.lr=1e-3 check.seeds=3",
        ],
    ),
    "sweep": Verb(
        about="Collect the runs of a sweep: results.csv, where the optimum is with its interval, and the figure.",
        parser="sparsetrain.cli.paths:sweep_words",
        run="sparsetrain.cli.paths:sweep",
        examples=[
            "sparsetrain sweep runs/supar_lr_transfer --out experiments/supar_lr_transfer",
            "sparsetrain sweep runs/supar_init_transfer --x model.init_std --out experiments/supar_init_transfer",
            "sparsetrain sweep runs/base_tuning --search --out experiments/base_tuning",
        ],
    ),
    "tune": Verb(
        about="Measure on this machine from which sparsity on a layer is computed by its nonzeros.",
        configuration="sparsetrain.bench.tune:TuneConfig",
        run="sparsetrain.bench.tune:tune",
        examples=["sparsetrain tune", "sparsetrain tune threads=[1,4,8] tokens=[512,4096]"],
    ),
    "bench": Verb(
        about="Measure how fast sparse layers and models are on this machine, beside dense ones and other libraries.",
        configuration="sparsetrain.bench:BenchConfig",
        run="sparsetrain.bench:bench",
        examples=[
            "sparsetrain bench",
            "sparsetrain bench preset=quick",
            "sparsetrain bench what=layers sparsities=[0.75,0.9] shapes=[[512,2048],[1024,1024]] threads=[1]",
            "sparsetrain bench what=model gpt.d_model=768 gpt.n_layers=12 max_seconds=600",
        ],
    ),
    "plan": Verb(
        about="Say what a run, a pipeline or a sweep would do: phases, counts, FLOPs, memory, time; do nothing.",
        parser="sparsetrain.cli.plan:plan_words",
        run="sparsetrain.cli.plan:plan",
        examples=[
            "sparsetrain plan pretrain model=demo sparsity.sparsity=0.75 budget.tokens=2000000",
            "sparsetrain plan pretrain 'budget.phases=[{share: 0.75, context: 64}, {share: 0.25, context: 256}]'",
            "sparsetrain plan pretrain -m experiment=supar_lr_transfer seed=0,1,2",
            "sparsetrain plan pipeline experiment=demo",
        ],
    ),
    "report": Verb(
        about="Show a run or a pipeline and write its page again, or compare arms over seeds: table, bars, figure.",
        parser="sparsetrain.cli.paths:report_words",
        run="sparsetrain.cli.paths:report",
        examples=[
            "sparsetrain report RUN_DIR",
            "sparsetrain report runs/pipeline-d128-L4-* --out experiments/demo",
            "sparsetrain report experiments/demo/results.csv",
        ],
    ),
    "mask": Verb(
        about="Inspect the masks of a run, a checkpoint or a file: statistics, and a picture.",
        parser="sparsetrain.cli.paths:mask_words",
        run="sparsetrain.cli.paths:mask",
        examples=["sparsetrain mask inspect RUN_DIR", "sparsetrain mask inspect masks.npz picture=masks.png"],
    ),
}


def find(name: str) -> Verb:
    """Return a verb by its name.

    Raises:
        UserError: there is none of this name.
    """
    if name not in VERBS:
        raise UserError(f"no verb '{name}'{nearest(name, VERBS)}; there are {', '.join(VERBS)}")
    return VERBS[name]


def with_settings() -> list[str]:
    """Return the names of the verbs that take settings."""
    return [name for name, verb in VERBS.items() if verb.configuration is not None]
