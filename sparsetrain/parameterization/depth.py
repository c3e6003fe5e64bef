"""The residual blocks of a model: their number, and the block of a base model that corresponds to each."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from sparsetrain import wrappers
from sparsetrain.errors import UserError
from sparsetrain.parameterization.roles import is_norm
from sparsetrain.parameterization.slices import slice_of

Structure = frozenset[str]


@dataclass(frozen=True)
class Blocks:
    """The residual blocks of a model.

    Args:
        lists: name of each list of blocks -> names of its blocks in order; a block that is used twice occurs twice.
        structures: block -> names, relative to the block, of its modules that hold parameters.
        unclear: names of lists inside blocks whose entries may be blocks themselves.
    """

    lists: Mapping[str, tuple[str, ...]]
    structures: Mapping[str, Structure]
    unclear: tuple[str, ...] = ()
    _list_of: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._list_of.update({block: name for name, blocks in self.lists.items() for block in blocks})

    def block_of(self, name: str) -> str | None:
        """Return the block that contains the module or parameter ``name``, or None."""
        parts = name.split(".")
        prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return next((prefix for prefix in prefixes if prefix in self._list_of), None)

    def list_of(self, block: str) -> str:
        return self._list_of[block]


def find_blocks(model: nn.Module, matrices: Collection[nn.Module], outputs: Collection[nn.Module]) -> Blocks:
    """Find the lists of blocks among the numbered modules of a model, at any level of nesting.

    A block is an entry of a `ModuleList`, a `Sequential` or the like that contains layers, among them a matrix and
    either a norm or an output projection. If such lists are nested, the inner one counts if its entries have the same
    structure and contain a norm each (stages of blocks); otherwise the outer one counts (experts, heads or sublayers of
    a block).

    Args:
        matrices: modules that hold a hidden or output matrix.
        outputs: modules that hold an output matrix.
    """
    modules = dict(wrappers.named_modules(model, remove_duplicate=False))
    wanted, ends = {id(module) for module in matrices}, {id(module) for module in outputs}
    inside: dict[str, list[nn.Module]] = {}
    lists: dict[str, tuple[str, ...]] = {}
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        if last.isdigit() and module._modules:
            within = list(module.modules())
            held = {id(one) for one in within}
            if held & wanted and (held & ends or any(is_norm(one) for one in within)):
                inside[name] = within
                lists[parent] = (*lists.get(parent, ()), name)
    structures = {entry: _structure(modules[entry]) for entry in inside}
    normed = {name for name, entries in lists.items() if all(any(is_norm(one) for one in inside[e]) for e in entries)}
    alike = {name for name in normed if len({structures[entry] for entry in lists[name]}) == 1}
    chosen: dict[str, tuple[str, ...]] = {}
    for name, entries in lists.items():
        within_another = any(_within(name, lists[other]) for other in lists)
        if (name in alike or not within_another) and not any(_within(other, entries) for other in alike):
            chosen[name] = entries
    unclear = tuple(
        name
        for name, entries in lists.items()
        if name in normed - chosen.keys() and len(entries) > 1 and any(_within(name, of) for of in chosen.values())
    )
    return Blocks(chosen, {entry: structures[entry] for entries in chosen.values() for entry in entries}, unclear)


def _within(name: str, entries: tuple[str, ...]) -> bool:
    return f"{name}.".startswith(tuple(f"{entry}." for entry in entries))


def _structure(module: nn.Module) -> Structure:
    owners = dict(wrappers.named_modules(module))
    # Attention and experts count as one module, whether their matrices are one tensor or a sparse layer each.
    slices = {name: slice_of(name, owners) for name in owners}
    held = {name for name, owner in owners.items() if any(p is not None for p in owner._parameters.values())}
    whole = {one.holder_name for one in slices.values() if one is not None}
    return frozenset({name for name in held if slices[name] is None} | whole)


def count_layers(model: nn.Module, blocks: Blocks, leaves: int) -> tuple[int, str]:
    """Return the number of residual blocks that a token passes, and the reason to doubt it, or an empty string.

    Args:
        leaves: number of numbered matrices outside blocks; it counts for a stack without blocks.
    """
    lengths = {name: len(entries) for name, entries in blocks.lists.items()}
    total = sum(lengths.values())
    config = getattr(wrappers.unwrap(model), "config", None)
    said = getattr(config, "num_hidden_layers", None)
    said = said if isinstance(said, int) and not isinstance(said, bool) and said > 0 else None
    if said is not None and lengths:
        if total == said or set(lengths.values()) == {said}:  # the latter: an encoder and a decoder
            return said, ""
        if hasattr(config, "num_hidden_groups"):  # ALBERT applies each group several times
            return said * getattr(config, "inner_group_num", 1), ""
        return said, f"its configuration says {said} layers, and it has {_listing(lengths)}"
    if not lengths:
        return max(1, leaves), "" if leaves else "it has no numbered blocks"
    # Stages of blocks are entries of one outer list; several outer lists may be an encoder and a decoder, or towers.
    roots = {re.split(r"(?:^|\.)\d+(?:\.|$)", name)[0] if re.search(r"\d", name) else name for name in lengths}
    if len(roots) > 1:
        return total, f"it has {_listing(lengths)}"
    if blocks.unclear:
        return total, f"it has {_listing(lengths)}, and '{blocks.unclear[0]}' inside them may be a list of blocks too"
    return total, ""


def _listing(lengths: Mapping[str, int]) -> str:
    return " and ".join(f"{count} blocks in '{name}'" for name, count in lengths.items())


def counterpart(block: str, blocks: Blocks, base: Blocks, shapes: Mapping[str, Mapping[str, int]]) -> str:
    """Return the name of the base's block that gives a block its base widths.

    It is the block of the same name or, if the base has fewer blocks, one of the same structure.

    Args:
        shapes: block of the base -> widths by name relative to the block.

    Raises:
        UserError: the base has no block of that structure, or several that differ in width.
    """
    structure = blocks.structures[block]
    if base.structures.get(block) == structure:
        return block
    own = blocks.list_of(block)
    for same in (lambda name: name == own, lambda name: re.sub(r"\d+", "#", name) == re.sub(r"\d+", "#", own)):
        entries = [entry for name, found in base.lists.items() if same(name) for entry in found]
        alike = [entry for entry in entries if base.structures[entry] == structure]
        different = [entry for entry in alike if shapes[entry] != shapes[alike[0]]]
        if different:
            raise UserError(
                f"parameterize: the base has fewer blocks than the model, and its blocks '{alike[0]}' and "
                f"'{different[0]}' differ in width, so the base of '{block}' is unclear; give a base of as many blocks"
            )
        if alike:
            return alike[0]
    raise UserError(
        f"parameterize: no block of the base has the layers of '{block}': a base of fewer blocks needs one of each "
        "kind of the model's blocks"
    )
