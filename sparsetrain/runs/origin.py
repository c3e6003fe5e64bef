"""The origin of a run: its corpus, its tokenizer and the weights that it starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsetrain.data import Corpora, Tokenizer
from sparsetrain.errors import UserError
from sparsetrain.files import sha256_of, whole_file, write_text
from sparsetrain.reading import read_text
from sparsetrain.runs.checkpoint import list_checkpoints
from sparsetrain.runs.layout import CHECKPOINTS, TOKENIZER, TRAIN_IDS
from sparsetrain.runs.recorded import read_config

MAX_ID_BYTES = 1 << 30
UNKNOWN_TEXT = "(text of an imported model)"
"""An entry among the ids of the documents that weights have seen: it stands for documents that nobody knows."""


@dataclass(frozen=True)
class Origin:
    """The origin of a run, saved in its directory so that the run can be used without the corpus.

    Args:
        corpus: `Corpora.key` of the text, which names its content.
        source: see `source_key`; None for a run from scratch.
        tokenizer: tokenizer of the corpus and the model.
        train_ids: ids of the documents that the weights have seen, to find test documents of a task among them.
    """

    corpus: str
    source: str | None
    tokenizer: Tokenizer
    train_ids: set[str]

    @classmethod
    def of_corpora(cls, corpora: Corpora, init_from: str | None = None) -> Origin:
        """Return the origin of a run on ``corpora``, from scratch or from the weights of another run."""
        seen = corpora.train_ids()
        if init_from is not None:
            seen |= cls.of_run(init_from).train_ids
        return cls(corpora.key, source_key(init_from), corpora.tokenizer, seen)

    @classmethod
    def of_run(cls, init_from: str) -> Origin:
        """Return the origin of a run that starts from the weights of another run and reads no corpus of its own."""
        directory = Path(init_from)
        corpus = str(read_config(directory).get("corpus"))
        try:
            seen = read_text(directory / TRAIN_IDS, MAX_ID_BYTES).split("\n")[:-1]
        except UserError as error:
            raise UserError(f"init_from={init_from}: {error}") from None
        return cls(corpus, source_key(init_from), run_tokenizer(directory), set(seen))

    @property
    def knows_its_text(self) -> bool:
        """Whether ``train_ids`` are all documents that the weights have seen."""
        return UNKNOWN_TEXT not in self.train_ids

    @property
    def facts(self) -> dict[str, str | None]:
        """The facts that a run records besides its settings."""
        return {"corpus": self.corpus, "source": self.source}

    def save(self, directory: Path) -> None:
        """Write the tokenizer and the document ids into the run directory."""
        with whole_file(directory / TOKENIZER) as temporary:
            self.tokenizer.save(temporary)
        write_text(directory / TRAIN_IDS, "".join(f"{name}\n" for name in sorted(self.train_ids)))


def source_key(init_from: str | None) -> str | None:
    """Return a key of the weights of a run: the name of its newest checkpoint and a hash of its manifest.

    Raises:
        UserError: there is no such run, or it has no checkpoint.
    """
    if init_from is None:
        return None
    directory = Path(init_from)
    if not directory.is_dir():
        raise UserError(f"init_from={directory}: no such run directory")
    names = list_checkpoints(directory / CHECKPOINTS)
    if not names:
        raise UserError(f"init_from={directory} holds no checkpoint")
    return f"{names[-1]}-{sha256_of(directory / CHECKPOINTS / names[-1] / 'manifest.json')[:16]}"


def run_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer that a run was trained with."""
    return Tokenizer.load(directory / TOKENIZER)
