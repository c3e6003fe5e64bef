"""Run everything that the bars of MediSwift need, seed by seed; what is done is skipped, what was stopped goes on.

    python experiments/mediswift_pipeline/run.py OUT [seeds=0,1,2] [pubmedqa=PUBMEDQA_DIR] [key=value ...]

Further ``key=value`` settings go to every command, for example ``schedule.tokens=20000`` for a quick look. Directories:
``OUT/seedS`` is the pipeline, ``OUT/seedS-TASK/ARM/HOW`` each run that starts from its weights.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from sparsetrain.cli import main as sparsetrain
from sparsetrain.stages.run import read_config

# Those of the pipeline's own fine-tuning, so that dense and sparse fine-tuning differ in the masks alone.
TUNING = ("optimizer.lr=1e-3", "schedule=linear_to_zero", "stage.batch_size=16", "stage.epochs=6", "stage.eval_every=0")


def commands(out: Path, seed: int, pubmedqa: str | None, extra: list[str]) -> Iterator[list[str]]:
    """Yield the command lines of one seed, in an order in which each finds the weights that it starts from."""
    home = out / f"seed{seed}"
    common = [f"seed={seed}", *extra]
    yield ["pipeline", "experiment=mediswift_pipeline", *common, f"run_dir={home}"]
    # Settings of the command line that only pre-training has do not concern what follows.
    later = [word for word in common if not word.startswith(("schedule.", "data.", "pipeline.", "model", "stage."))]
    task = read_config(home)["task"]
    counts = [f"task.{key}={task[key]}" for key in ("n_train", "n_validation", "n_test")]
    tasks = {"section_roles": ["task=section_roles", *counts]}
    if pubmedqa is not None:
        tasks["pubmedqa"] = ["task=pubmedqa", f"task.path={pubmedqa}"]
    for name, settings in tasks.items():
        settings = [*settings, *(word for word in later if not word.startswith("task.")), *TUNING]
        place = out / f"seed{seed}-{name}"
        for arm in sorted(path.parent.name for path in home.glob("*/pretrain")):
            start = f"init_from={home / arm / 'pretrain'}"
            if arm != "dense":
                yield ["finetune", start, "mode=sparse", *settings, f"run_dir={place / arm / 'finetune-sparse'}"]
            yield ["prompt", start, "train=prompt", *settings, f"run_dir={place / arm / 'prompt-frozen'}"]
            if name != "section_roles":
                yield ["finetune", start, "mode=dense", *settings, f"run_dir={place / arm / 'finetune'}"]
                yield ["prompt", start, "train=both", *settings, f"run_dir={place / arm / 'prompt'}"]
        if name != "section_roles":
            model = [f"data.{key}={read_config(home)['data'][key]}" for key in ("vocab_size", "context")]
            model += [word for word in common if word.startswith(("model", "data."))]
            yield ["finetune", "sparsity=dense", *model, *settings, f"run_dir={place / 'scratch' / 'finetune'}"]


def main(words: list[str]) -> int:
    """Run the commands; return the first exit status that is not 0 or 1 (a diverged run is a result)."""
    out, settings = Path(words[0]), dict(word.split("=", 1) for word in words[1:])
    seeds = [int(seed) for seed in settings.pop("seeds", "0,1,2").split(",")]
    pubmedqa = settings.pop("pubmedqa", None)
    extra = [f"{key}={value}" for key, value in settings.items()]
    for seed in seeds:
        for command in commands(out, seed, pubmedqa, extra):
            print("sparsetrain", *command, flush=True)
            status = sparsetrain(command)
            if status > 1:
                return status
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2 or "=" in sys.argv[1]:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
