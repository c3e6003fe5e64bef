"""Names of the files in a run directory.
    run_dir/
        .lock               held by the process that writes the directory
        config.yaml         the settings and the facts that identify the run
        tokenizer.json      tokenizer of the corpus and the model
        train_ids.txt       ids of the documents that the weights have seen
        backends.json       backend of each sparse layer
        metrics.jsonl       one line per logged step and per evaluation
        checkpoints/        see `sparsetrain.runs.checkpoint`
        task.json           how a task asks, see `sparsetrain.data.tasks.form`
        predictions.csv     what a model on a task predicts of the test rows
        result.json         written last; if it exists, the run is done

A pipeline also has ``report.json``, ``report.html`` and a directory ``ARM/STAGE`` for each of its runs. A bench has
``bench.json``.
"""

from __future__ import annotations

from pathlib import Path

CONFIG, RESULT, TOKENIZER, CHECKPOINTS = "config.yaml", "result.json", "tokenizer.json", "checkpoints"
METRICS, LOCK, TRAIN_IDS, BACKENDS = "metrics.jsonl", ".lock", "train_ids.txt", "backends.json"
TASK, PREDICTIONS = "task.json", "predictions.csv"
REPORT, PAGE, BENCH = "report.json", "report.html", "bench.json"


def stage_directories(pipeline: Path) -> list[Path]:
    """Return the run directories inside the directory of a pipeline, sorted; an empty list if it is no pipeline."""
    return sorted(path.parent for path in pipeline.glob(f"*/*/{CONFIG}"))
