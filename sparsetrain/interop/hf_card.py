"""The README of an exported directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sparsetrain.interop.layouts import Layout
from sparsetrain.interop.mask_file import MASK_FILE
from sparsetrain.models import ModelConfig

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


class Written(Protocol):
    """What was written; see `sparsetrain.interop.hf.Exported`."""

    @property
    def directory(self) -> Path: ...
    @property
    def parameters(self) -> int: ...
    @property
    def nonzeros(self) -> int: ...
    @property
    def difference(self) -> float | None: ...
    @property
    def notes(self) -> Sequence[str]: ...


def card(name: str, layout: Layout, config: ModelConfig, written: Written, sparsity: Mapping[str, Any] | None) -> str:
    """Return the README of an exported directory.

    Args:
        name: of the run.
        config: the model that was written.
        sparsity: the section ``sparsity_config``, of a sparse model.
    """
    place = written.directory.name
    tags = "tags:\n- sparsetrain\n" + ("- sparse\n" if sparsity else "")
    lines = [
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n{tags}---",
        f"# {name}",
        f"A language model trained with sparsetrain, as `{layout.architecture}`: {config.n_layers} layers of width "
        f"{config.d_model}, {written.parameters:,} parameters, {written.nonzeros:,} of them not masked. It was trained "
        f"on sequences of up to {config.max_context} tokens.",
        _LOAD.format(place=place),
    ]
    if written.difference is not None:
        lines.append(
            f"On a sample of tokens the logits differ from those of the run by at most {written.difference:.1e}."
        )
    if sparsity:
        share = f"{sparsity['masked_sparsity']:.4g} of the entries of {len(sparsity['layers'])} matrices are zero."
        layer = next(iter(sparsity["layers"]))
        lines += ["## Sparsity", share, _MASKS.format(file=MASK_FILE, place=place, layer=layer)]
    if written.notes:
        lines += ["## What was changed", "\n".join(f"- {note}" for note in written.notes)]
    return "\n\n".join(line.strip() for line in lines) + "\n"
