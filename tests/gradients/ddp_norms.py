"""One of two processes: under DDP each gets the norms of its own examples, those of one process with all of them."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import sparsetrain

if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    config = sparsetrain.ModelConfig(d_model=32, n_layers=1, n_heads=2, vocab_size=47, sparsity=0.5, seed=0)
    model = sparsetrain.Transformer(config)
    tokens, targets = torch.randint(0, 47, (2, 4, 9))
    with sparsetrain.per_example_norms(model) as norms:
        model(tokens, targets).backward()
    whole = norms.squared
    model.zero_grad()
    wrapped = DistributedDataParallel(model)
    mine = slice(2 * rank, 2 * rank + 2)
    with sparsetrain.per_example_norms(wrapped) as norms:
        wrapped(tokens[mine], targets[mine]).backward()
    assert norms.squared.keys() == whole.keys()
    for name, squared in norms.squared.items():
        torch.testing.assert_close(squared, whole[name][mine], rtol=1e-4, atol=0.0)
    dist.destroy_process_group()
