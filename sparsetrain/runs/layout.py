"""The names of the files in a run directory, and what tells the kinds of directories apart.

    run_dir/
        .lock               held by the process that writes here
        config.yaml         the settings, and what identifies the run
        tokenizer.json      of the corpus and the model
        train_ids.txt       the documents that the weights have seen
        backends.json       which backend computes each sparse layer
        metrics.jsonl       one line a logged step
        checkpoints/        see `sparsetrain.runs.checkpoint`
        result.json         written last: the run is done

A pipeline has ``report.json``, ``report.html`` and a directory ``ARM/STAGE`` for each of its runs; a bench has
``bench.json``.
"""

from __future__ import annotations

from pathlib import Path

CONFIG, RESULT, TOKENIZER, CHECKPOINTS = "config.yaml", "result.json", "tokenizer.json", "checkpoints"
METRICS, LOCK, TRAIN_IDS, BACKENDS = "metrics.jsonl", ".lock", "train_ids.txt", "backends.json"
REPORT, PAGE, BENCH = "report.json", "report.html", "bench.json"


def stage_directories(pipeline: Path) -> list[Path]:
    """Return the run directories inside the directory of a pipeline, sorted; none for one that is no pipeline."""
    return sorted(path.parent for path in pipeline.glob(f"*/*/{CONFIG}"))
