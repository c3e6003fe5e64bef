"""The held-out text of a corpus, on which models with different tokenizers are compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrain.data import Batch, Corpora, Corpus, Tokenizer
from sparsetrain.data.tokens import IGNORED
from sparsetrain.data.vocabulary import fertility
from sparsetrain.models import Transformer
from sparsetrain.stages.stage import Training
from sparsetrain.training.evaluate import evaluating


@dataclass(frozen=True)
class HeldOut:
    """Whole documents of the validation text of a corpus; which ones does not depend on the tokenizer.

    Args:
        texts: the documents.
        bytes: their UTF-8 bytes.
    """

    texts: list[str]
    bytes: int

    @classmethod
    def of(cls, corpus: Corpus, most: int) -> HeldOut:
        """Return documents of a corpus, spread evenly over its validation text, of about ``most`` bytes."""
        documents = [(text, len(text.encode())) for text in _documents(corpus)]
        share = most / max(1, sum(size for _, size in documents))
        done = taken = 0
        texts = []
        for text, size in documents:
            if taken <= share * done:
                taken += size
                texts.append(text)
            done += size
        return cls(texts, taken)

    def score(
        self, model: Transformer, tokenizer: Tokenizer, context: int, batch_size: int, training: Training
    ) -> tuple[float, float]:
        """Return the cross-entropy in nats per token and in bits per byte of the texts.

        Each document is followed by the token that ends it, whose cross-entropy counts. One more stands before the
        first document, so that each token of the text is predicted once under every tokenizer.
        """
        ids = [tokenizer.eos_id]
        for encoded in tokenizer.encode_batch(self.texts):
            ids += [*encoded, tokenizer.eos_id]
        nats = 0.0
        with evaluating(model), training.autocasting():
            for batch in _windows(torch.tensor(ids), context).split(batch_size):
                moved = batch.to(training.device)
                nats += model.token_losses(moved.tokens, moved.targets).double().sum().item()
        return nats / (len(ids) - 1), nats / math.log(2) / self.bytes

    def fertility(self, tokenizer: Tokenizer) -> tuple[float, float]:
        """Return the tokens per byte and per word of the texts."""
        return fertility(tokenizer, self.texts)


def held_out(corpora: Corpora, most: int) -> Mapping[str, HeldOut]:
    """Return the held-out text of each corpus, of about ``most`` bytes."""
    return {name: HeldOut.of(corpus, most) for name, corpus in corpora.items()}


def _documents(corpus: Corpus) -> Iterator[str]:
    ids = corpus.validation.window(0, len(corpus.validation))
    start = 0
    for end in (ids == corpus.tokenizer.eos_id).nonzero().flatten().tolist():
        yield corpus.tokenizer.decode(ids[start:end].tolist())
        start = end + 1


def _windows(ids: Tensor, context: int) -> Batch:
    """Return windows ``[N, context]`` in which each token but the first is the target of one position."""
    count = -(-(len(ids) - 1) // context)
    tokens = torch.zeros(count * context, dtype=torch.int64)
    targets = torch.full((count * context,), IGNORED, dtype=torch.int64)
    tokens[: len(ids) - 1], targets[: len(ids) - 1] = ids[:-1], ids[1:]
    return Batch(tokens.view(count, context), targets.view(count, context))
