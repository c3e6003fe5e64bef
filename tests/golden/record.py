"""Golden runs: small trainings through the command line, whose losses and masks are on file in ``golden.json``.

``python tests/golden/record.py OUT.json [--tree CHECKOUT] [--only NAME ...]`` trains them with the library of another
checkout and writes what they gave, every float in hexadecimal. So two commits can be compared bit for bit on one
machine. After a change that is meant to move losses, the same command writes ``tests/golden/golden.json`` anew.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Settings of every run; then, for each run, its verb, the run that it starts from, and its own settings.
COMMON = {
    "device": "cpu",
    "threads": 1,
    "loop.precision": "fp32",
    "loop.log_every": 1,
    "loop.eval_every": 8,
    "loop.eval_sequences": 16,
    "loop.checkpoint_every": 0,
    "budget.steps": 24,
    "budget.batch_size": 8,
    "data.context": 32,
    "data.tokenizer": "bytes",
    "model": "tiny",
    "parameterization": "supar",
    "parameterization.base_width": 16,
    "optimizer.lr": 4e-3,
    "seed": 3,
}
STATIC = {"sparsity.sparsity": 0.75}
QUARTER = {**STATIC, "sparsity.evolution.every": 4}
TASK = {"task": "pubmedqa", "optimizer.lr": 1.2e-2, "budget.steps": 40}
RUNS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "dense": ("pretrain", None, {"sparsity": "dense"}),
    "static": ("pretrain", None, STATIC),
    "blocks": ("pretrain", None, {**STATIC, "sparsity.pattern": "block", "sparsity.block": "[8,8]"}),
    "accumulated": (
        "pretrain",
        None,
        {
            **STATIC,
            "loop.accumulation": 2,
            "data.tokenizer": "bpe",
            "data.vocab_size": 300,
            "model.dropout": 0.1,
            "model.positions": "learned",
            "schedule": "cosine",
            "parameterization": "supar_completep",
            "sparsity.allocation": "erk",
        },
    ),
    "rigl": ("pretrain", None, {**QUARTER, "sparsity.evolution.rule": "rigl"}),
    "staggered": (
        "pretrain",
        None,
        {
            **QUARTER,
            "sparsity.evolution.rule": "rigl",
            "sparsity.evolution.accumulation": "staggered",
            "sparsity.evolution.every": 8,
            "loop.accumulation": 2,
        },
    ),
    "set": ("pretrain", None, {**QUARTER, "sparsity.evolution.rule": "set"}),
    "gmp": ("pretrain", None, {**QUARTER, "sparsity.evolution.rule": "gmp"}),
    "vspdf": (
        "pretrain",
        None,
        {
            **STATIC,
            "sparsity.evolution.rule": "vspdf",
            "sparsity.evolution.phases": "[{at: 0.3, sparsity: 0.5}, {at: 0.7, sparsity: 0.0}]",
        },
    ),
    "continued": ("pretrain", "set", {**QUARTER, "sparsity.evolution.rule": "set", "budget.steps": 8}),
    "finetuned dense": ("finetune", "static", {**TASK, "mode": "dense"}),
    "finetuned sparse": ("finetune", "static", {**TASK, "mode": "sparse"}),
    "prompt and model": ("prompt", "static", {**TASK, "train": "both", "n_tokens": 4}),
    "prompt alone": ("prompt", "static", {**TASK, "train": "prompt", "n_tokens": 4, "optimizer.lr": 5e-2}),
}
# Which weights these drop or grow hangs on rounding, so that another processor may choose others.
RANKED = ("rigl", "staggered", "set", "gmp", "continued")

# What the keys above were called before there was a budget.
BEFORE_BUDGET = {
    "budget.steps": "schedule.steps",
    "budget.batch_size": "stage.batch_size",
    "budget.epochs": "stage.epochs",
    **{
        f"loop.{name}": f"stage.{name}"
        for name in ("precision", "log_every", "eval_every", "eval_sequences", "checkpoint_every", "accumulation")
    },
}


def chain(name: str) -> list[str]:
    """Return the name of a run and the names of the runs that start from it."""
    return [name, *(other for other, (_, start, _) in RUNS.items() if start == name)]


ROOTS = [name for name, (_, start, _) in RUNS.items() if start is None]


def train(names: Iterable[str], folder: Path) -> dict[str, Any]:
    """Train runs in ``folder``, each after the run that it starts from; return what they gave, by name.

    Raises:
        RuntimeError: a command failed; the message holds what it wrote.
    """
    from sparsetrain.cli import main

    text, questions = folder / "text.txt", folder / "questions"
    write_text(text)
    write_questions(questions)
    given = {}
    for name in names:
        verb, start, settings = RUNS[name]
        settings = {
            **COMMON,
            "data.path": text,
            "data.separator": "blank_line",
            **settings,
            "run_dir": folder / name.replace(" ", "-"),
        }
        if "task" in settings:
            settings["task.path"] = questions
        if start is not None:
            settings["init_from"] = folder / start
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            status = main([verb, *words(settings)])
        if status:
            raise RuntimeError(f"{name}: exit status {status}\n{out.getvalue()}{err.getvalue()}")
        given[name] = outcome(settings["run_dir"])
    return given


def words(settings: dict[str, Any]) -> list[str]:
    """Return settings as a command line has them, groups first, by the names that this version of the library knows."""
    before = importlib.util.find_spec("sparsetrain.optim.budget") is None
    named = {BEFORE_BUDGET.get(key, key) if before else key: value for key, value in settings.items()}
    return [f"{key}={value}" for key, value in sorted(named.items(), key=lambda item: "." in item[0])]


def outcome(directory: Path) -> dict[str, Any]:
    """Return what a run gave: numbers of every step, its result, and digests of its final masks and weights."""
    from safetensors.numpy import load_file

    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((directory / "result.json").read_text())
    newest = max((directory / "checkpoints").glob("step-*"))
    tensors = load_file(newest / "model.safetensors")
    masks = [name for name in sorted(tensors) if name.endswith((".row_ptr", ".col"))]
    return {
        **{
            key: {str(record["step"]): float(record[key]).hex() for record in records if key in record}
            for key in ("loss", "grad_norm", "val_loss", "val_accuracy", "val_macro_f1")
        },
        "result": {
            key: float(result[key]).hex()
            for key in ("loss_last", "bits_per_byte", "accuracy", "macro_f1", "density", "tokens")
            if key in result
        },
        "flops": result["flops"]["total"],
        "nnz": {name: tensors[name].size for name in masks if name.endswith(".col")},
        "masks": digest(tensors, masks),
        "weights": digest(tensors, sorted(tensors)),
    }


def digest(tensors: dict[str, Any], names: list[str]) -> str:
    """Return a digest of the names and bytes of some tensors."""
    content = hashlib.sha256()
    for name in names:
        content.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        content.update(tensors[name].tobytes())
    return content.hexdigest()[:32]


def host() -> str:
    """Return what decides how sums are rounded: the processor and the versions of torch and of the compiler."""
    import numba
    import torch

    model = "unknown"  # not asked of the library: its tree may be an older one
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{model}, torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}, numba {numba.__version__}"


def write_text(path: Path) -> None:
    """Write 150 paragraphs whose words follow each other by a chain, always the same."""
    draw = random.Random(7)
    syllables = [start + end for start in "bdfglmnprst" for end in ("a", "e", "i", "o", "un", "er")]
    lexicon = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(60)]
    after = {word: draw.choices(lexicon, k=4) for word in lexicon}
    paragraphs = []
    for number in range(150):
        word, sentence = draw.choice(lexicon), []
        for _ in range(20):
            sentence.append(word)
            word = draw.choice(after[word])
        paragraphs.append(f"{number}. {' '.join(sentence).capitalize()}.")
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


def write_questions(folder: Path) -> None:
    """Write 80 questions in the form of PubMedQA, 32 of them to test on, whose answers show in their wording."""
    draw = random.Random(11)
    told = {"yes": "+", "no": "-", "maybe": "?"}
    rows = {}
    for number in range(80):
        answer = draw.choice(list(told))
        context = [f"Case {number}."]
        rows[str(900_000 + number)] = {"QUESTION": told[answer], "CONTEXTS": context, "final_decision": answer}
    folder.mkdir(exist_ok=True)
    (folder / "ori_pqal.json").write_text(json.dumps(rows))
    (folder / "test_ground_truth.json").write_text(json.dumps(dict.fromkeys(list(rows)[:32], "yes")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where the numbers go")
    parser.add_argument("--tree", type=Path, help="a checkout whose library trains; by default the installed one")
    parser.add_argument("--only", nargs="+", choices=ROOTS, default=ROOTS, metavar="NAME", help=", ".join(ROOTS))
    given = parser.parse_args()
    if given.tree is not None:
        sys.path.insert(0, str(given.tree.resolve()))
    import torch

    import sparsetrain

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPARSETRAIN_CACHE"] = str(Path(folder) / "cache")
        runs = train((name for root in given.only for name in chain(root)), Path(folder))
    given.out.write_text(json.dumps({"host": host(), "runs": runs}, indent=1) + "\n")
    print(f"{len(runs)} runs by {Path(sparsetrain.__file__).parent}, written to {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
