"""The text and the model of a planned adaptation, as far as they are known before it runs."""

from __future__ import annotations

import math
from dataclasses import replace

from sparsetrain.data import Corpora, Tokenizer
from sparsetrain.runs.layout import TOKENIZER
from sparsetrain.runs.origin import run_tokenizer
from sparsetrain.stages.adapt import Adaptation, resulting, tokenizer_place
from sparsetrain.stages.config import AdaptConfig, model_config
from sparsetrain.stages.plan_inputs import Inputs
from sparsetrain.vocabulary import row_change


def planned_adaptation(config: AdaptConfig, inputs: Inputs) -> tuple[AdaptConfig, str, Corpora | None, list[str]]:
    """Return the configuration with the model that results, the key of the text, the text, and notes.

    The text is None if it is not prepared, or if a tokenizer does not exist yet. Its key is then empty, and the number
    of rows is the one that is wanted.

    Raises:
        UserError: ``init_from`` is missing, or the text cannot be read.
    """
    start, vocabulary = Adaptation(config).start, config.vocabulary
    known = (start / TOKENIZER).is_file()
    old = run_tokenizer(start) if known else None
    tokens = config.data.vocab_size if old is None else old.vocab_size
    rows = model_config(config.model, min(tokens, config.model.get("vocab_size") or tokens)).vocab_size
    place = None if old is None else tokenizer_place(config, old)
    if old is None or place is None or not place.is_file():
        wanted = max(tokens + vocabulary.n_tokens, rows)
        wanted = math.ceil(wanted / vocabulary.multiple_of) * vocabulary.multiple_of
        note = f"The text needs the tokenizer of {start}, which does not exist yet."
        if known:
            note = f"The tokens are not learned on {config.learned_on} yet; the run learns them."
        return resulting(config, wanted, 0), "", None, [note]
    key, corpora = inputs.corpora(replace(config.data, tokenizer_path=str(place)))
    new = Tokenizer.load(place) if corpora is None else corpora.tokenizer
    change = row_change(old, new, rows, vocabulary.multiple_of)
    tokens = new.vocab_size if corpora is not None else 0  # without the text, the rows must be given
    return resulting(config, len(change.source), tokens), key, corpora, []
