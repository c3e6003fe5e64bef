"""Adaptation of a trained model to another language: new tokens, new blocks, and what of the old is forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor

from sparsetrain.data import Corpora, Tokenizer, prepare_corpora
from sparsetrain.data.extended_tokenizer import extended, place_of_extension
from sparsetrain.errors import UserError
from sparsetrain.models import Transformer
from sparsetrain.models.config import ADJUSTABLE
from sparsetrain.models.frozen_rows import train_rows
from sparsetrain.models.new_blocks import added, sources, with_identities
from sparsetrain.models.resize import vocabulary_matrices
from sparsetrain.report.adaptation import adaptation_sheet
from sparsetrain.report.tables import print_sheets
from sparsetrain.runs.layout import TOKENIZER
from sparsetrain.runs.origin import Origin, run_tokenizer, source_key
from sparsetrain.runs.result import RunResult, finished
from sparsetrain.runs.weights import read_weights
from sparsetrain.screen import say
from sparsetrain.sparsity import MaskManager, Static, sparse_layers
from sparsetrain.stages.config import AdaptConfig, model_config
from sparsetrain.stages.generate import run_config
from sparsetrain.stages.held_out import HeldOut, held_out
from sparsetrain.stages.masks import mask_manager, seeded
from sparsetrain.stages.pretrain import FINAL_EVALUATION, Pretraining
from sparsetrain.stages.stage import Subject, Training, restored_model, train
from sparsetrain.training.observers import Observer
from sparsetrain.training.state import TrainState
from sparsetrain.vocabulary import RowChange, extend_embeddings, row_change, shared_tokens

Scores = dict[str, dict[str, float]]
"""Validation loss and bits per byte of each corpus."""


def adapt(config: AdaptConfig, console: Console | None = None, observers: Sequence[Observer] = ()) -> RunResult:
    """Adapt a trained model to other text, and return the result with what was gained and forgotten.

    Args:
        observers: as in `pretrain`.

    Raises:
        UserError: ``init_from`` is missing, or the input cannot be used.
        Interrupted, Diverged: as in `pretrain`.
    """
    return train(Adaptation(config, console), observers)


class Adaptation(Pretraining):
    """Training of a model whose vocabulary and depth may have grown, on the text of several languages.

    ``given`` has the model that the run starts from. `origin` and `prepare` give ``config`` the model that results,
    which is the one that is recorded.

    Args:
        corpora: the prepared text, if it is already loaded, under the tokenizer that results.
    """

    kind: ClassVar[str] = "adapt"

    def __init__(self, config: AdaptConfig, console: Console | None = None, corpora: Corpora | None = None) -> None:
        super().__init__(config, console, corpora)
        if config.init_from is None:
            raise UserError("init_from is missing: adapt needs a trained model, init_from=RUN_DIR")
        self.given, self.start = config, Path(config.init_from)

    @cached_property
    def old(self) -> Tokenizer:
        """The tokenizer of the run that this one starts from."""
        source_key(self.given.init_from)  # raises if there is no such run
        found = run_tokenizer(self.start)
        found.need_bytes(f"init_from={self.start}: adapt")
        return found

    @property
    def corpora(self) -> Corpora:
        if self._corpora is None:
            given = self.given
            place = tokenizer_place(given, self.old)
            if given.vocabulary.n_tokens:
                members = given.data.members()
                extended(self.old, members, given.learned_on, given.vocabulary.n_tokens, True, self.console)
            data = replace(given.data, tokenizer_path=str(place))
            self._corpora = prepare_corpora(data, progress=True, console=self.console)
        return self._corpora

    @cached_property
    def change(self) -> RowChange:
        """The rows of the resulting model; ``config`` gets this model when it is first asked for.

        Raises:
            UserError: there are no new tokens to train alone, or the donor knows none of the old ones.
        """
        given = self.given
        if given.vocabulary.donor is not None:
            source_key_of_donor(given)  # raises if there is no such run, before any text is read
        new = self.corpora.tokenizer
        new.need_bytes(f"data.tokenizer_path={given.data.tokenizer_path}: adapt")
        rows = model_config(given.model, self.old.vocab_size).vocab_size
        change = row_change(self.old, new, rows, given.vocabulary.multiple_of)
        if given.train == "new_rows" and not change.fresh:
            place = given.data.tokenizer_path
            raise UserError(f"train=new_rows needs new tokens: data.tokenizer_path={place} adds none")
        if given.vocabulary.donor is not None:
            try:
                shared_tokens(self.old, run_tokenizer(Path(given.vocabulary.donor)))
            except UserError as error:
                raise UserError(f"vocabulary.{error}") from None
        self.config = resulting(given, len(change.source), new.vocab_size)
        return change

    @property
    def title(self) -> str:
        return "adapt"

    def origin(self) -> Origin:
        assert self.change is not None
        return Origin.of_corpora(self.corpora, self.config.init_from)

    def facts(self) -> dict[str, str | None]:
        return donor_facts(self.given)

    def prepare(self, origin: Origin | None = None) -> None:
        assert self.change is not None
        super().prepare(origin)

    def build(self, device: torch.device) -> Subject:
        given = self.given
        model = self._restored(self.config.model["n_layers"], given.new_blocks, device)
        vocabulary, tokenizer = given.vocabulary, self.corpora.tokenizer
        if tokenizer.sha256 != self.old.sha256 or len(self.change.source) != model.config.vocab_size:
            method, donor = vocabulary.method, vocabulary.donor
            extend_embeddings(
                *(model, self.old, tokenizer, method, donor),
                k=vocabulary.k,
                multiple_of=vocabulary.multiple_of,
                seed=given.seed,
            )
        model.parameterize(given.parameterization, reinitialise=False)
        self._freeze(model)
        return Subject(model, model, self._masks(model))

    def _restored(self, n_layers: int, new_blocks: int, device: torch.device) -> Transformer:
        """Return the model of the start with its vocabulary and, if asked for, with new blocks."""
        given, weights = self.given, read_weights(self.start)
        if new_blocks:
            deeper = with_identities(weights.model, n_layers - new_blocks, new_blocks)
            weights = replace(weights, model=deeper)
        config = replace(given, model={**given.model, "n_layers": n_layers}, new_blocks=0, train="all")
        return restored_model(config, weights, self.old.vocab_size, device, self.start)

    def _freeze(self, model: Transformer) -> None:
        if self.given.train == "all":
            return
        trained: tuple[str, ...] = tuple(vocabulary_matrices(model))
        if self.given.train == "blocks":
            trained = tuple(f"blocks.{place}." for place in self._new_places)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))

    @property
    def _new_places(self) -> list[int]:
        return added(self.given.model["n_layers"], self.given.new_blocks)

    def _masks(self, model: Transformer) -> MaskManager | None:
        found = mask_manager(self.config, model, self.budget)
        if found is None or self.given.train == "all":
            return found
        return MaskManager(model, Static(), include=["*"], seed=seeded(self.config).seed)

    def describe(self) -> None:
        count, tokens = len(self.change.fresh), self.corpora.tokenizer.vocab_size
        method = f" ({self.given.vocabulary.method})" if count else ""
        blocks, trained = self.given.new_blocks, self.given.train
        say(
            self.console,
            f"adapt: {tokens:,} tokens, {count:,} of them new{method}; new blocks: {blocks}; trained: {trained}",
        )
        if len(self.corpora) == 1:
            say(self.console, "adapt: what is forgotten is not reported, since the run reads a single corpus")

    def begin(self, training: Training) -> None:
        super().begin(training)
        if self.given.train == "new_rows":
            for matrix in vocabulary_matrices(training.network).values():
                train_rows(matrix, self.change.fresh, training.optimizer)
        # Fewer tokens than bytes, so the evaluation is never longer than that of a pre-training.
        self.texts = held_out(self.corpora, FINAL_EVALUATION * self._context)
        self.before = self._scores(self._start_model(training), self.old)
        self.initialised = self._scores(training.network, self.corpora.tokenizer)
        self.first_norms = self._norms()

    def _start_model(self, training: Training) -> Transformer:
        """Return the model of the start as its own run has it, whatever this run changes of its multipliers.

        It has the backends of the training, so that it rounds as the training does.
        """
        layers, own = self.given.model["n_layers"], run_config(self.start)
        model = self._restored(layers, 0, training.device)
        model.parameterize(own.parameterization, reinitialise=False)
        start = model_config(own.model, model.config.vocab_size)
        for name in ADJUSTABLE:
            setattr(model.config, name, getattr(start, name))
        originals = [old for old, is_copy in sources(layers, self.given.new_blocks) if not is_copy]
        places = [place for place, (_, copy) in enumerate(sources(layers, self.given.new_blocks)) if not copy]
        chosen = {name: layer.backend for name, layer in sparse_layers(training.network)}
        for name, layer in sparse_layers(model):
            head, block, leaf = name.split(".", 2)
            layer.backend = chosen[f"{head}.{places[originals.index(int(block))]}.{leaf}"]
        return model

    @property
    def _context(self) -> int:
        return self.budget.phases[-1].context

    def _scores(self, model: Transformer, tokenizer: Tokenizer) -> Scores:
        found = {}
        for name, text in self.texts.items():
            size = self.budget.phases[-1].batch_size
            loss, bits = text.score(model, tokenizer, self._context, size, self.training)
            found[name] = {"val_loss": loss, "bits_per_byte": bits}
        return found

    def _norms(self) -> dict[str, dict[str, float | None]]:
        """Return the mean norms of the old and the new rows of each matrix with a row per token."""
        fresh = torch.zeros(len(self.change.source), dtype=torch.bool)
        fresh[self.change.fresh] = True
        known = self.change.source >= 0

        def mean(rows: Tensor) -> float | None:
            return rows.norm(dim=1).mean().item() if len(rows) else None

        return {
            name: {"old": mean(matrix.detach().cpu()[known]), "new": mean(matrix.detach().cpu()[fresh])}
            for name, matrix in vocabulary_matrices(self.training.network).items()
        }

    def entries(self) -> dict[str, Any]:
        return {**super().entries(), "init_from": self.given.init_from}

    def trained_parameters(self) -> int:
        if self.given.train != "new_rows":
            return super().trained_parameters()
        return sum(m.shape[1] * len(self.change.fresh) for m in vocabulary_matrices(self.training.network).values())

    def score(self, state: TrainState, directory: Path) -> dict[str, Any]:
        found = self._adaptation(self._scores(self.training.network, self.corpora.tokenizer))
        print_sheets([adaptation_sheet(found)], self.console)
        return {**super().score(state, directory), "adaptation": found}

    def _adaptation(self, after: Scores) -> dict[str, Any]:
        """Return the entry of the result about what was gained and forgotten."""
        origin = self._chain(self.before)
        first = next(iter(self.corpora))
        forgotten = after[first]["bits_per_byte"] - origin[first]["bits_per_byte"]
        return {
            "first": first,
            "forgetting": forgotten if len(self.corpora) > 1 else None,
            "train": self.given.train,
            "method": self.given.vocabulary.method if self.change.fresh else None,
            "old_tokens": self.old.vocab_size,
            "new_tokens": self.corpora.tokenizer.vocab_size,
            "new_rows": len(self.change.fresh),
            "new_blocks": self.given.new_blocks,
            "row_norms": {"initialised": self.first_norms, "after": self._norms()},
            "corpora": {name: self._about(text, name, after) for name, text in self.texts.items()},
            "origin": origin,
        }

    def _about(self, text: HeldOut, name: str, after: Scores) -> dict[str, Any]:
        old, new = text.fertility(self.old), text.fertility(self.corpora.tokenizer)
        moments = {"before": self.before, "initialised": self.initialised, "after": after}
        return {
            "bytes": text.bytes,
            "tokens_per_byte": {"old": old[0], "new": new[0]},
            "tokens_per_word": {"old": old[1], "new": new[1]},
            **{
                key: {moment: scores[name][key] for moment, scores in moments.items()}
                for key in ("val_loss", "bits_per_byte")
            },
        }

    def _chain(self, before: Scores) -> dict[str, dict[str, float]]:
        """Return the bits per byte of each corpus at the start of the chain of adaptations.

        They are those of an earlier adaptation if it measured the same text, which a changed context can prevent.
        """
        done = finished(self.start)
        earlier: Mapping[str, Any] = (done.values.get("adaptation") if done is not None else None) or {"origin": {}}
        found = {name: dict(entry) for name, entry in earlier["origin"].items()}
        for name, text in self.texts.items():
            if name not in found or found[name]["bytes"] != text.bytes:
                found[name] = {"bits_per_byte": before[name]["bits_per_byte"], "bytes": text.bytes}
        return found


def resulting(config: AdaptConfig, rows: int, tokens: int) -> AdaptConfig:
    """Return the configuration with the model that results, of ``rows`` rows for ``tokens`` tokens."""
    model = {**config.model, "n_layers": config.model["n_layers"] + config.new_blocks}
    if model.get("vocab_size") is not None or rows != tokens:
        model["vocab_size"] = rows
    return replace(config, model=model)


def tokenizer_place(config: AdaptConfig, old: Tokenizer) -> Path:
    """Return the file of the tokenizer that results from ``old``; it need not exist."""
    assert config.init_from is not None
    if config.vocabulary.n_tokens:
        members = config.data.members()
        return place_of_extension(old, members, config.learned_on, config.vocabulary.n_tokens)
    return Path(config.data.tokenizer_path or Path(config.init_from) / TOKENIZER)


def source_key_of_donor(config: AdaptConfig) -> str | None:
    """Return the key of the donor's weights, see `source_key`.

    Raises:
        UserError: the donor is no run; the message names the setting.
    """
    try:
        return source_key(config.vocabulary.donor)
    except UserError as error:
        raise UserError(str(error).replace("init_from", "vocabulary.donor", 1)) from None


def donor_facts(config: AdaptConfig) -> dict[str, str | None]:
    """Return the fact about the donor that identifies a run; nothing without a donor."""
    return {} if config.vocabulary.donor is None else {"donor": source_key_of_donor(config)}
