"""The table of verbs. Help, parsing, schemas and execution follow from its rows.

To add a verb, write a row here and its function; a verb with settings also needs a dataclass and ``conf/VERB.yaml``.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsetrain.cli.verb import Verb
from sparsetrain.errors import UserError, nearest

VERBS: dict[str, Verb] = {
    "data": Verb(
        about="Read a corpus, train its tokenizer, write its token files.",
        configuration="sparsetrain.cli.start:DataVerbConfig",
        run="sparsetrain.cli.start:data",
        examples=["sparsetrain data", "sparsetrain data data.path=notes.txt data.vocab_size=2048"],
        group="data",
        usage="data.path=FILE [key=value ...]",
        first=["data.path", "data.name", "data.vocab_size"],
    ),
    "data-dedup": Verb(
        about="Remove duplicates and near-duplicates from a corpus.",
        configuration="sparsetrain.data.dedup:DedupConfig",
        run="sparsetrain.data.dedup:dedup",
        examples=[
            "sparsetrain data dedup data.path=notes.txt out=deduplicated",
            "sparsetrain data dedup data=python threshold=0.7 out=deduplicated",
        ],
        group="data",
        usage="data.path=FILE out=DIR [key=value ...]",
        first=["data.path", "out", "threshold"],
    ),
    "pretrain": Verb(
        about="Train a language model on text, dense or sparse from step one.",
        configuration="sparsetrain.stages:PretrainConfig",
        run="sparsetrain.stages:pretrain",
        examples=[
            "sparsetrain pretrain model=demo sparsity.sparsity=0.75 budget.tokens=2000000",
            "sparsetrain pretrain data.path=notes.txt model.d_model=64 budget.steps=200 run_dir=runs/notes",
            "sparsetrain pretrain -m sparsity.sparsity=0,0.5,0.75 optimizer.lr=1e-3,2e-3,4e-3",
        ],
        inherits=["parameterization"],
        prunes=True,
        cost="sparsetrain.stages.estimate:sweep_cost",
        group="train",
    ),
    "adapt": Verb(
        about="Adapt a trained model to another language, with new tokens.",
        configuration="sparsetrain.stages:AdaptConfig",
        run="sparsetrain.stages:adapt",
        examples=[
            "sparsetrain adapt init_from=RUN_DIR vocabulary.n_tokens=1024 train=embeddings "
            "'data.sources={english: {name: medline}, arabic: {name: hadith}}'",
            "sparsetrain adapt init_from=RUN_DIR data.mixture.arabic=1 data.mixture.english=1 "
            "'data.sources={english: {name: medline}, arabic: {name: hadith}}'",
            "sparsetrain adapt init_from=RUN_DIR new_blocks=2 train=blocks data=hadith",
        ],
        inherits=["parameterization"],
        group="train",
        usage="init_from=RUN_DIR data=NAME [key=value ...]",
        first=["init_from", "vocabulary.n_tokens", "train"],
    ),
    "finetune": Verb(
        about="Train a model on a labelled task, dense or with its masks.",
        configuration="sparsetrain.stages:FinetuneConfig",
        run="sparsetrain.stages:finetune",
        examples=[
            "sparsetrain finetune init_from=RUN_DIR task=section_roles",
            "sparsetrain finetune init_from=RUN_DIR task=pubmedqa task.path=PUBMEDQA_DIR mode=sparse",
        ],
        inherits=["parameterization", "data"],
        group="train",
        usage="init_from=RUN_DIR task=NAME [key=value ...]",
        first=["init_from", "task.name", "task.path", "mode"],
    ),
    "prompt": Verb(
        about="Learn a soft prompt for a task, alone or with the model.",
        configuration="sparsetrain.stages:PromptConfig",
        run="sparsetrain.stages:prompt",
        examples=[
            "sparsetrain prompt init_from=RUN_DIR n_tokens=16",
            "sparsetrain prompt init_from=RUN_DIR train=both",
        ],
        inherits=["parameterization", "data"],
        group="train",
        usage="init_from=RUN_DIR task=NAME [key=value ...]",
        first=["init_from", "task.name", "task.path", "n_tokens", "train"],
    ),
    "evaluate": Verb(
        about="Measure a trained model at several lengths and on probes.",
        configuration="sparsetrain.stages:EvaluateConfig",
        run="sparsetrain.stages:evaluate",
        examples=[
            "sparsetrain evaluate init_from=RUN_DIR",
            "sparsetrain evaluate init_from=RUN_DIR lengths=[64,128,256,512] scales=[1,dynamic,2] probes=[]",
            "sparsetrain evaluate init_from=RUN_DIR probes=[title] sizes=[512,1024] n_probes=100",
            "sparsetrain evaluate init_from=RUN_DIR data.path=notes.txt",
        ],
        inherits=["data"],
        group="use",
        usage="init_from=RUN_DIR [key=value ...]",
        first=["init_from", "data.path", "lengths", "scales", "probes"],
    ),
    "pipeline": Verb(
        about="Pre-train, fine-tune and prompt at several sparsities; report.",
        configuration="sparsetrain.stages:PipelineConfig",
        run="sparsetrain.cli.start:pipeline",
        examples=[
            "sparsetrain pipeline experiment=demo",
            "sparsetrain pipeline experiment=demo 'pipeline.arms={sparsity.sparsity:[0,0.5,0.75]}'",
            "sparsetrain pipeline experiment=demo pipeline.stages.finetune.budget.epochs=3",
        ],
        group="train",
        usage="experiment=NAME [key=value ...]",
        first=["pipeline.arms"],
    ),
    "generate": Verb(
        about="Continue a text with the model of a run.",
        configuration="sparsetrain.stages:GenerateConfig",
        run="sparsetrain.cli.start:generate",
        examples=["sparsetrain generate init_from=RUN_DIR prompt='The aim of this study was'"],
        group="use",
        usage="init_from=RUN_DIR prompt=TEXT [key=value ...]",
        first=["init_from", "prompt", "max_new_tokens", "temperature", "top_p"],
    ),
    "export": Verb(
        about="Write the model of a run for Hugging Face transformers.",
        configuration="sparsetrain.interop.hf:ExportConfig",
        run="sparsetrain.interop.hf:export",
        examples=[
            "sparsetrain export init_from=RUN_DIR output=DIR",
            "sparsetrain export init_from=RUN_DIR format=hf layout=llama output=DIR",
        ],
        group="use",
        usage="init_from=RUN_DIR output=DIR [key=value ...]",
        first=["init_from", "output", "layout"],
    ),
    "import": Verb(
        about="Make a run of a Hugging Face model, to start other verbs from.",
        configuration="sparsetrain.interop.hf_import:ImportConfig",
        run="sparsetrain.interop.hf_import:import_model",
        examples=[
            "sparsetrain import source=DIR run_dir=runs/imported",
            "sparsetrain import source=OWNER/NAME run_dir=runs/new sparsity.sparsity=0.75 sparsity.pattern=magnitude",
        ],
        group="use",
        usage="source=DIR_OR_NAME run_dir=RUN_DIR [key=value ...]",
        first=["source", "run_dir"],
    ),
    "predict": Verb(
        about="Label the rows of a table with the model of a run on a task.",
        configuration="sparsetrain.stages:PredictConfig",
        run="sparsetrain.cli.start:predict",
        examples=[
            "sparsetrain predict init_from=RUN_DIR input=new.csv output=predictions.csv",
            "sparsetrain predict init_from=RUN_DIR input=new.jsonl output=labelled.parquet columns.text=abstract",
        ],
        group="use",
        usage="init_from=RUN_DIR input=FILE output=FILE [key=value ...]",
        first=["init_from", "input", "output"],
    ),
    "quantize": Verb(
        about="Write the model of a run in 4 or 8 bits, with the loss of both.",
        parser="sparsetrain.cli.paths:quantize_arguments",
        run="sparsetrain.cli.paths:quantize",
        examples=["sparsetrain quantize RUN_DIR out=DIR", "sparsetrain quantize RUN_DIR out=DIR bits=8 group=32"],
        group="use",
    ),
    "coord-check": Verb(
        about="Check that activations and updates keep their scale.",
        configuration="sparsetrain.studies.coordinates:CoordinatesConfig",
        run="sparsetrain.studies.coordinates:coord_check",
        examples=[
            "sparsetrain coord-check",
            "sparsetrain coord-check check=depth parameterization=completep parameterization.base_layers=2 "
            "check.seeds=2",
            "sparsetrain coord-check check=width parameterization=mup optimizer.lr=1e-3 check.seeds=3",
        ],
        group="measure",
        usage="check=AXIS [key=value ...]",
        first=["check.axis", "check.values", "check.schemes", "check.seeds"],
    ),
    "sweep": Verb(
        about="Summarise the runs of a sweep: table, optimum and figure.",
        parser="sparsetrain.cli.paths:sweep_arguments",
        run="sparsetrain.cli.paths:sweep",
        examples=[
            "sparsetrain sweep runs/supar_lr_transfer --out experiments/supar_lr_transfer",
            "sparsetrain sweep runs/supar_init_transfer --x model.init_std --out experiments/supar_init_transfer",
            "sparsetrain sweep runs/base_tuning --search --out experiments/base_tuning",
        ],
        group="measure",
    ),
    "fit": Verb(
        about="Fit a law to a sweep: timescale, batch, loss or noise scale.",
        parser="sparsetrain.cli.paths:fit_arguments",
        run="sparsetrain.cli.paths:fit",
        examples=[
            "sparsetrain fit runs/decays law=tau out=laws/tau",
            "sparsetrain fit runs/batches law=batch out=laws/batch",
            "sparsetrain fit runs/batches/results.csv law=critical target=2.1",
            "sparsetrain fit runs/observed law=noise out=laws/noise",
        ],
        group="measure",
    ),
    "suggest": Verb(
        about="Suggest rate, weight decay, batch and steps from laws.",
        configuration="sparsetrain.studies.suggest:SuggestConfig",
        run="sparsetrain.studies.suggest:suggest",
        examples=[
            "sparsetrain suggest model=demo budget.tokens=20000000",
            "sparsetrain suggest model=demo budget.tokens=20000000 sparsity.sparsity=0.75 laws=laws/tau/law.yaml",
            "sparsetrain suggest model=demo seconds=3600 flops_per_second=5e10 format=json",
        ],
        inherits=["parameterization"],
        group="plan",
        first=["budget.tokens", "laws"],
    ),
    "provision": Verb(
        about="Plan models and machines for hours, money or FLOPs.",
        configuration="sparsetrain.studies.provision_config:ProvisionConfig",
        run="sparsetrain.studies.provision:provision",
        examples=[
            "sparsetrain provision money=1000 machine=[cs3,h100] devices=[1,8] laws=chinchilla data.context=2048",
            "sparsetrain provision hours=24 machine=this laws=laws/loss/law.yaml sparsities=[0,0.75,0.9]",
            "sparsetrain provision flops=1e18 machine=[zen4,h100] laws=chinchilla format=json out=plan",
        ],
        group="plan",
        usage="hours=H|money=USD|flops=N [key=value ...]",
        first=["hours", "money", "flops", "machine", "devices", "laws", "sparsities"],
    ),
    "tune": Verb(
        about="Measure here from which sparsity sparse kernels beat dense.",
        configuration="sparsetrain.bench.tune:TuneConfig",
        run="sparsetrain.bench.tune:tune",
        examples=["sparsetrain tune", "sparsetrain tune threads=[1,4,8] tokens=[512,4096]"],
        group="measure",
    ),
    "bench": Verb(
        about="Measure the speed of sparse layers and models beside dense.",
        configuration="sparsetrain.bench:BenchConfig",
        run="sparsetrain.bench:bench",
        examples=[
            "sparsetrain bench",
            "sparsetrain bench preset=quick",
            "sparsetrain bench what=layers sparsities=[0.75,0.9] shapes=[[512,2048],[1024,1024]] threads=[1]",
            "sparsetrain bench what=model gpt.d_model=768 gpt.n_layers=12 max_seconds=600",
        ],
        group="measure",
        first=["what", "sparsities", "threads", "max_seconds"],
    ),
    "plan": Verb(
        about="Print what a run or a sweep would do: FLOPs, memory, time.",
        parser="sparsetrain.cli.plan:plan_arguments",
        run="sparsetrain.cli.plan:plan",
        examples=[
            "sparsetrain plan pretrain model=demo sparsity.sparsity=0.75 budget.tokens=2000000",
            "sparsetrain plan pretrain 'budget.phases=[{share: 0.75, context: 64}, {share: 0.25, context: 256}]'",
            "sparsetrain plan pretrain -m experiment=supar_lr_transfer seed=0,1,2",
            "sparsetrain plan pipeline experiment=demo",
        ],
        group="plan",
        usage="VERB [key=value ...]",
    ),
    "flops": Verb(
        about="Count FLOPs, bytes and memory of one step, module by module.",
        configuration="sparsetrain.studies.flops:FlopsConfig",
        run="sparsetrain.studies.flops:count_flops",
        examples=[
            "sparsetrain flops model=demo sparsity.sparsity=0.75",
            "sparsetrain flops model=demo data.context=512 budget.batch_size=8 attention=causal format=json",
            "sparsetrain flops model=demo phase=decoding cached=1023 budget.batch_size=1",
            "sparsetrain flops init_from=RUN_DIR output=flops.json",
        ],
        inherits=["parameterization", "data"],
        group="plan",
        first=["init_from", "phase", "data.context", "output"],
    ),
    "simulate": Verb(
        about="Predict time, memory, energy and price on other machines.",
        configuration="sparsetrain.studies.simulate:SimulateConfig",
        run="sparsetrain.studies.simulate:simulate_runs",
        examples=[
            "sparsetrain simulate model=demo sparsity.sparsity=0,0.5,0.9 machine=[cs3,h100] budget.tokens=20000000",
            "sparsetrain simulate init_from=RUN_DIR machine=[this,a100] out=DIR",
            "sparsetrain simulate model=demo machine=h100 dtype=bfloat16 parallelism.data=8 budget.tokens=1000000000",
            "sparsetrain simulate model=demo sparsity.sparsity=0,0.75 machine=cs3 budget.tokens=20000000 equal=flops",
        ],
        inherits=["parameterization", "data", "optimizer", "schedule", "budget", "loop"],
        together=True,
        group="plan",
        usage="machine=NAME [key=value ...]",
        first=["init_from", "machine", "dtype", "equal"],
    ),
    "calibrate": Verb(
        about="Measure this machine, so that step times can be predicted.",
        configuration="sparsetrain.bench.calibrate:CalibrateConfig",
        run="sparsetrain.bench.calibrate:calibrate_this",
        examples=["sparsetrain calibrate", "sparsetrain calibrate budget_seconds=300 threads=[1,4]"],
        group="measure",
        first=["budget_seconds", "threads"],
    ),
    "report": Verb(
        about="Show a run or a pipeline, or compare arms over seeds.",
        parser="sparsetrain.cli.paths:report_arguments",
        run="sparsetrain.cli.paths:report",
        examples=[
            "sparsetrain report RUN_DIR",
            "sparsetrain report runs/pipeline-d128-L4-* --out experiments/demo",
            "sparsetrain report experiments/demo/results.csv",
        ],
        group="measure",
    ),
    "mask": Verb(
        about="Inspect the masks of a run, a checkpoint or a file.",
        parser="sparsetrain.cli.paths:mask_arguments",
        run="sparsetrain.cli.paths:mask",
        examples=["sparsetrain mask inspect RUN_DIR", "sparsetrain mask inspect masks.npz picture=masks.png"],
        group="measure",
    ),
}


def find(name: str) -> Verb:
    """Return a verb by its name.

    Raises:
        UserError: there is no such verb.
    """
    if name not in VERBS:
        raise UserError(f"no verb '{name}'{nearest(name, VERBS)}; there are {', '.join(VERBS)}")
    return VERBS[name]


def spoken(name: str) -> str:
    """Return the name of a verb as it is typed: a verb named after another one has two words, as ``data dedup``."""
    outer, dash, inner = name.partition("-")
    return f"{outer} {inner}" if dash and outer in VERBS else name


def typed(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the name of the typed verb and the words behind it; ``data dedup`` is the verb ``data-dedup``."""
    joined = "-".join(words[:2])
    return (joined, list(words[2:])) if len(words) > 1 and joined in VERBS else (words[0], list(words[1:]))


def with_settings() -> list[str]:
    """Return the names of the verbs that take settings."""
    return [name for name, verb in VERBS.items() if verb.configuration is not None]
