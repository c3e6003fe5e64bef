"""Text to tokens to batches: corpora, tokenizers, token files, and labelled tasks."""

from sparsetrain.data.corpus import Corpus, DataConfig, find_prepared, open_corpus, prepare
from sparsetrain.data.split import split_of
from sparsetrain.data.task_batches import ScoringBatch, TaskBatches, answer_tokens, scoring_batches
from sparsetrain.data.tasks import Example, Task, TaskConfig, find_task, load_task
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.data.tokens import Batch, PackedSamples, TokenFile, sequential_windows

__all__ = [
    "Batch",
    "Corpus",
    "DataConfig",
    "Example",
    "PackedSamples",
    "ScoringBatch",
    "Task",
    "TaskBatches",
    "TaskConfig",
    "TokenFile",
    "Tokenizer",
    "answer_tokens",
    "find_prepared",
    "find_task",
    "load_task",
    "open_corpus",
    "prepare",
    "scoring_batches",
    "sequential_windows",
    "split_of",
]
