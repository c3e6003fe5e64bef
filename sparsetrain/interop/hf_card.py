"""The README of an exported directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsetrain.interop.fold import Plain
from sparsetrain.interop.layouts import Layout
from sparsetrain.interop.mask_file import MASK_FILE

_LOAD = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```
"""
_MASKS = """\
The zeros are in the weights. `{file}` says which entries the masks keep, one bit each; in numpy:

```python
import numpy as np

masks = np.load("{place}/{file}")
rows, columns = masks["{layer}.shape"]  # outputs, inputs
kept = np.unpackbits(masks["{layer}.bits"], axis=1, count=columns).astype(bool)
```

`sparsetrain import source={place} run_dir=RUN` makes a run of sparsetrain of it, with these masks.
"""


def card(
    name: str,
    place: str,
    layout: Layout,
    plain: Plain,
    nonzeros: int,
    sparsity: Mapping[str, Any] | None,
    difference: float | None,
    notes: Sequence[str],
) -> str:
    """Return the README of an exported directory.

    Args:
        name: of the run. place: the name of the directory.
        plain: the model that was written.
        sparsity: the section ``sparsity_config``, of a sparse model.
        difference: largest measured difference of a logit.
        notes: sentences on what was folded and what was left out.
    """
    config = plain.config
    tags = "tags:\n- sparsetrain\n" + ("- sparse\n" if sparsity else "")
    lines = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{tags}---",
        f"# {name}",
        f"A language model trained with sparsetrain, as `{layout.architecture}`: {config.n_layers} layers of width "
        f"{config.d_model}, {plain.parameters():,} parameters, {nonzeros:,} of them not masked. It was trained on "
        f"sequences of up to {config.max_context} tokens.",
        _LOAD.format(place=place),
    ]
    if difference is not None:
        lines.append(f"On a sample of tokens the logits differ from those of the run by at most {difference:.1e}.")
    if sparsity:
        share = f"{sparsity['masked_sparsity']:.4g} of the entries of {len(sparsity['layers'])} matrices are zero."
        layer = next(iter(sparsity["layers"]))
        lines += ["## Sparsity", share, _MASKS.format(file=MASK_FILE, place=place, layer=layer)]
    if notes:
        lines += ["## What was changed", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(line.strip() for line in lines) + "\n"
