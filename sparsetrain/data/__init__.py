"""Text to tokens to batches: corpora, tokenizers, token files, and labelled tasks."""

import importlib
import pkgutil

from sparsetrain.data import medline, sources, tasks
from sparsetrain.data.config import CorpusConfig, DataConfig
from sparsetrain.data.corpora import Corpora, find_corpora, prepare_corpora
from sparsetrain.data.corpus import Corpus, open_corpus, prepare
from sparsetrain.data.fim import fill_in_the_middle
from sparsetrain.data.mixture import Mixture
from sparsetrain.data.sources.base import Document, Section, Source
from sparsetrain.data.sources.registry import SOURCES, SourceConfig, register_source
from sparsetrain.data.split import split_of
from sparsetrain.data.tasks.base import Example, Task, take
from sparsetrain.data.tasks.batches import TaskBatches
from sparsetrain.data.tasks.form import Asked, Form
from sparsetrain.data.tasks.registry import TASKS, TaskConfig, find_task, load_task, register_task
from sparsetrain.data.tasks.scoring import ScoringBatch, question_batches, scored_tokens
from sparsetrain.data.tokenizer import Tokenizer
from sparsetrain.data.tokens import Batch, PackedSamples, Samples, TokenFile, document_border, sequential_windows

# The file that defines a source or a task also registers it, so importing every file of these packages is enough.
for _wing in (medline, sources, tasks):
    for _found in pkgutil.iter_modules(_wing.__path__, f"{_wing.__name__}."):
        importlib.import_module(_found.name)

__all__ = [
    "SOURCES",
    "TASKS",
    "Asked",
    "Batch",
    "Corpora",
    "Corpus",
    "CorpusConfig",
    "DataConfig",
    "Document",
    "Example",
    "Form",
    "Mixture",
    "PackedSamples",
    "Samples",
    "ScoringBatch",
    "Section",
    "Source",
    "SourceConfig",
    "Task",
    "TaskBatches",
    "TaskConfig",
    "TokenFile",
    "Tokenizer",
    "document_border",
    "fill_in_the_middle",
    "find_corpora",
    "find_task",
    "load_task",
    "open_corpus",
    "prepare",
    "prepare_corpora",
    "question_batches",
    "register_source",
    "register_task",
    "scored_tokens",
    "sequential_windows",
    "split_of",
    "take",
]
