"""A trained model under another tokenizer: rows of known tokens are copied, and those of new tokens get values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsetrain import seeds
from sparsetrain.data.tokenizer import Spelling, Tokenizer
from sparsetrain.errors import UserError, check_choice
from sparsetrain.models import Transformer, new_rows
from sparsetrain.models.new_rows import DONOR_METHODS, METHODS, DonorRows
from sparsetrain.models.resize import resize, vocabulary_matrices
from sparsetrain.runs.layout import TOKENIZER
from sparsetrain.runs.weights import read_weights

TokenizerLike: TypeAlias = Tokenizer | str | Path
Donor: TypeAlias = tuple[TokenizerLike, Any] | str | Path

_EMBED, _HEAD = "embed.weight", "head.weight"


def extend_embeddings(
    model: Transformer,
    old: TokenizerLike,
    new: TokenizerLike,
    method: str = "subword_mean",
    donor: Donor | None = None,
    *,
    match_norms: bool = True,
    k: int | None = None,
    multiple_of: int = 1,
    seed: int = 0,
    optimizer: Optimizer | Sequence[Optimizer] = (),
) -> Transformer:
    """Change ``model``, in place, from the tokenizer ``old`` to ``new``, and return it.

    A token that both tokenizers have, by its bytes and not by its id, keeps its row of the embedding and of an untied
    head, bit for bit. If ``new`` extends ``old`` (`extend_tokenizer`), these are the rows of all old tokens, and the
    model computes the same hidden states and the same logits of old tokens for text that is split as before. If not,
    the tokenizer is replaced, and the rows of tokens that only ``old`` has are dropped.

    The rows of new tokens are, with V old rows w_v and the old tokens p_1, ..., p_n that spell the new token:

    - ``random``: from N(0, init_std^2), as the model began;
    - ``mean``: the mean of all w_v;
    - ``gaussian``: from N(mean, covariance) of the w_v;
    - ``subword_mean``: the mean of the w_p (arXiv 2407.12869);
    - ``similarity``: the mean of the rows of the k shared tokens that are nearest in the donor's embedding, weighted by
      softmax(cosine / 0.1) (WECHSEL, arXiv 2112.06598);
    - ``omp``: the donor's row is written as a sum of at most k shared rows of the donor by orthogonal matching pursuit,
      and the same coefficients combine the old rows (arXiv 2506.06607);
    - ``least_squares``: A e_donor(v), where A minimises the sum over shared tokens of |A e_donor(v) - w_v|^2
      (arXiv 2407.12869).

    The last three need a donor. A new token that the donor lacks is there the mean of the donor's tokens that spell it.
    The embedding and the head get their rows by the same method, each from its own old rows. A new special token has
    no spelling, so it gets the mean row where a spelling is needed.

    The parameters stay the same objects and drop their gradients. An optimizer made before must be given here: its
    moments move with the rows, and those of new rows are 0. (Adam's bias correction does not begin anew, so that the
    first steps of new rows are up to (1 - beta1) / sqrt(1 - beta2) times as long, 3.2 times for 0.9 and 0.999.) The
    multipliers of the parameterization, alpha_in and alpha_out / m_d, do not depend on the vocabulary and stay.

    Rows that no token has, because the model has more rows than ``new`` has tokens, are the mean row; an extension
    keeps the old ones, and never has fewer rows than before.

    Args:
        model: a bare `Transformer`; wrap or compile it afterwards.
        old, new: the tokenizers, or paths of ``tokenizer.json``.
        method: one of the above.
        donor: ``(tokenizer, matrix [tokens, width])``, used for the embedding and for the head;
            ``(tokenizer, Transformer)``; or the directory of a run. The last two give each matrix its own donor rows.
        match_norms: whether each new row is scaled to the mean norm of the old rows.
        k: the number of shared tokens that a row is combined from; None means 10 for ``similarity``, 64 for ``omp``.
        multiple_of: the number of rows is rounded up to a multiple of this.
        seed: seed of ``random`` and ``gaussian``.
        optimizer: the optimizers that train the model, if there are any.

    Raises:
        UserError: the model is no bare `Transformer`, has fewer rows than ``old`` has tokens or rows that are not
            finite; a tokenizer loses text; the method is unknown; a donor is missing, is not used, is malformed or
            shares no token of two or more bytes with ``old``; or the state of an optimizer cannot follow. The model and
            the optimizers are then unchanged.
    """
    if not isinstance(model, Transformer):
        raise UserError(
            f"model is a {type(model).__name__}, not a bare st.Transformer; extend the model before it is wrapped"
        )
    check_choice("method", method, METHODS)
    if (donor is None) == (method in DONOR_METHODS):
        known = ", ".join(DONOR_METHODS)
        raise UserError(f"method={method} {'needs a donor' if donor is None else f'uses no donor; these do: {known}'}")
    for name, value in (("multiple_of", multiple_of), ("k", 1 if k is None else k)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{name}={value!r} is not a positive integer")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"seed={seed!r} is not an integer")
    before, after = _tokenizer(old, "old"), _tokenizer(new, "new")
    if before.vocab_size > model.config.vocab_size:
        raise UserError(
            f"old has {before.vocab_size} tokens, more than the {model.config.vocab_size} rows of the model"
        )
    change = row_change(before, after, model.config.vocab_size, multiple_of)
    lender = None if donor is None else _lender(donor)
    parameters = vocabulary_matrices(model)
    matrices = {}
    spellings = [after.spellings[token] for token in change.fresh]
    for name, parameter in parameters.items():
        rows = _finite(parameter, f"the model's {name}")[: before.vocab_size]
        made = rows[:0]
        if spellings:
            lent = None if lender is None else lender.rows(name == _HEAD, before, spellings)
            generator = seeds.generator(seed, "new rows", name)
            made = _made(method, rows, before, spellings, lent, k, model.config.init_std, generator)
            made = new_rows.with_norm(made, rows.norm(dim=-1).mean(), rows.mean(0)) if match_norms else made
        matrices[name] = change.applied(parameter.detach(), made, rows.mean(0))
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    resize(model, matrices, change.source, optimizers)
    return model


# -------------------------------------------------------------------------------------------------------- which rows


@dataclass(frozen=True)
class RowChange:
    """The rows of a model under another tokenizer.

    Attributes:
        source: int64 ``[rows]``, the old row of each row; -1 for a new token and for a row that no token has.
        fresh: the ids of the new tokens.
    """

    source: Tensor
    fresh: list[int]

    def applied(self, old: Tensor, made: Tensor, mean: Tensor) -> Tensor:
        """Return ``[rows, D]`` like ``old``: rows from ``old`` as they are, ``made`` for new tokens, else ``mean``."""
        result = mean.to(old).repeat(len(self.source), 1)
        result[self.fresh] = made.to(old)
        here = (self.source >= 0).to(old.device)
        result[here] = old[self.source.to(old.device)[here]]
        return result


def row_change(old: Tokenizer, new: Tokenizer, rows: int, multiple_of: int = 1) -> RowChange:
    """Return the rows of a model of ``rows`` rows under another tokenizer; see `extend_embeddings`."""
    extends = new.spellings[: old.vocab_size] == old.spellings
    needed = max(new.vocab_size, rows) if extends else new.vocab_size
    source = torch.full((math.ceil(needed / multiple_of) * multiple_of,), -1)
    if extends:
        source[: old.vocab_size] = torch.arange(old.vocab_size)
        source[new.vocab_size : rows] = torch.arange(new.vocab_size, max(rows, new.vocab_size))
    else:
        places = {spelling: index for index, spelling in reversed(list(enumerate(old.spellings)))}
        source[: new.vocab_size] = torch.tensor([places.get(spelling, -1) for spelling in new.spellings])
    fresh = (source[: new.vocab_size] < 0).nonzero().flatten().tolist()
    return RowChange(source, fresh)


def _made(
    method: str,
    rows: Tensor,
    old: Tokenizer,
    spellings: Sequence[Spelling],
    donor: DonorRows | None,
    k: int | None,
    std: float,
    generator: torch.Generator,
) -> Tensor:
    """Return the rows ``[N, D]`` of the new tokens by a method, before their norms are matched."""
    if method == "random":
        return new_rows.random_rows(len(spellings), rows.shape[1], std, generator)
    if method == "mean":
        return rows.mean(0).repeat(len(spellings), 1)
    if method == "gaussian":
        return new_rows.gaussian_rows(rows, len(spellings), generator)
    if method == "subword_mean":
        return new_rows.subword_rows(rows, [_pieces(old, spelling) for spelling in spellings])
    assert donor is not None
    if method == "least_squares":
        return new_rows.least_squares_rows(rows, donor)
    combine = {"similarity": new_rows.similar_rows, "omp": new_rows.omp_rows}[method]
    return combine(rows, donor, new_rows.DEFAULT_K[method] if k is None else k)


def _pieces(tokenizer: Tokenizer, spelling: Spelling) -> list[int]:
    return tokenizer.cut(spelling) if isinstance(spelling, bytes) else []


# -------------------------------------------------------------------------------------------------------- the donor


@dataclass(frozen=True)
class _Lender:
    """A donor's tokenizer and its matrices, float64 ``[tokens, E]``; the head's is None if it has none of its own."""

    tokenizer: Tokenizer
    embedding: Tensor
    head: Tensor | None

    def rows(self, of_head: bool, old: Tokenizer, spellings: Sequence[Spelling]) -> DonorRows:
        """Return the donor's rows for the shared tokens and for new tokens, of its head or of its embedding.

        Raises:
            UserError: the donor shares no token of two or more bytes with ``old``.
        """
        matrix = self.head if of_head and self.head is not None else self.embedding
        places = {spelling: index for index, spelling in enumerate(self.tokenizer.spellings)}
        shared = shared_tokens(old, self.tokenizer)
        ids, theirs = torch.tensor(shared).T
        pieces = [
            [places[spelling]] if spelling in places else _pieces(self.tokenizer, spelling) for spelling in spellings
        ]
        return DonorRows(ids, matrix[theirs], new_rows.subword_rows(matrix, pieces))


def shared_tokens(old: Tokenizer, donor: Tokenizer) -> list[tuple[int, int]]:
    """Return the ids, here and in a donor's tokenizer, of the tokens of two or more bytes that both have.

    Raises:
        UserError: there are none.
    """
    places = {spelling: index for index, spelling in enumerate(donor.spellings)}
    # Every tokenizer has all single bytes, whether its text had them or not, so they tell nothing.
    found = [
        (index, places[spelling])
        for index, spelling in enumerate(old.spellings)
        if isinstance(spelling, bytes) and len(spelling) > 1 and spelling in places
    ]
    if not found:
        raise UserError(
            "donor: it shares no token of two or more bytes with the old tokenizer; give a donor that knows the old "
            "language too"
        )
    return found


def _lender(donor: Donor) -> _Lender:
    if isinstance(donor, str | Path):
        directory = Path(donor)
        try:
            tensors = read_weights(directory).model
        except UserError as error:
            raise UserError(f"donor: {str(error).removeprefix('init_from=')}") from None
        tokenizer, values = Tokenizer.load(directory / TOKENIZER), [tensors.get(_EMBED), tensors.get(_HEAD)]
    elif isinstance(donor, tuple) and len(donor) == 2:
        tokenizer, given = _tokenizer(donor[0], "donor"), donor[1]
        if isinstance(given, Transformer):
            own = vocabulary_matrices(given)
            values = [own[_EMBED], own.get(_HEAD)]
        else:
            values = [given, None]
    else:
        raise UserError("donor is neither (tokenizer, matrix), (tokenizer, Transformer) nor the directory of a run")
    matrices = [None if value is None else _matrix(value, tokenizer) for value in values]
    if matrices[0] is None:
        raise UserError(f"donor: the run {donor} has no {_EMBED}")
    return _Lender(tokenizer, matrices[0], matrices[1])


def _matrix(value: Any, tokenizer: Tokenizer) -> Tensor:
    try:
        matrix = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"donor: its matrix is a {type(value).__name__}, not numbers [tokens, width]") from None
    if matrix.is_complex():
        raise UserError("donor: its matrix is complex; real numbers [tokens, width] are needed")
    if matrix.ndim != 2 or len(matrix) < tokenizer.vocab_size or matrix.shape[1] == 0:
        raise UserError(
            f"donor: its matrix has shape {list(matrix.shape)}, but [tokens, width] with at least the "
            f"{tokenizer.vocab_size} tokens of its tokenizer is needed"
        )
    return _finite(matrix, "the donor's matrix")[: tokenizer.vocab_size]


def _finite(matrix: Tensor, what: str) -> Tensor:
    """Return a matrix as float64 on the CPU."""
    if matrix.is_meta:
        raise UserError(f"{what} has no values (it is on the meta device)")
    found = matrix.detach().to("cpu", torch.float64)
    if not bool(found.isfinite().all()):
        raise UserError(f"{what} has values that are not finite")
    return found


def _tokenizer(given: TokenizerLike, name: str) -> Tokenizer:
    if isinstance(given, str | Path):
        return Tokenizer.load(given)
    if not isinstance(given, Tokenizer):
        raise UserError(f"{name}: a {type(given).__name__} is neither a tokenizer nor the path of one")
    return given
