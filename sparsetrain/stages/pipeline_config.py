"""The configuration of a pipeline: stages that start from one another, and arms as a product over settings."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsetrain.data import TaskConfig
from sparsetrain.errors import UserError, check_choice, nearest
from sparsetrain.optim import LENGTHS
from sparsetrain.runs.identity import beyond
from sparsetrain.runs.layout import CONFIG, PAGE, REPORT, RESULT
from sparsetrain.runs.recorded import complete
from sparsetrain.sparsity import SparsityConfig
from sparsetrain.stages.config import FinetuneConfig, PretrainConfig, PromptConfig, RunConfig, build

KINDS: dict[str, type[RunConfig]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "prompt": PromptConfig}
"""What a stage of a pipeline may run, with the settings that it has."""

OWN = ("optimizer", "schedule", "budget", "loop")
"""Sections of a pipeline that are those of its pre-training alone; other stages have defaults of their own."""

PLACED = ("init_from", "run_dir", "runs_dir", "device", "threads", "force", "draw")
"""Settings that the pipeline sets for its stages."""

RUN_SETTINGS = {each.name for each in dataclasses.fields(RunConfig)} | {"task"}
"""What a stage has from the pipeline unless it says otherwise."""

_SECTIONS = {"model", "data", "sparsity", "parameterization", "optimizer", "schedule", "budget", "loop", "task"}
_TAKEN = (CONFIG, RESULT, REPORT, PAGE)  # names of files beside the directories of stages and arms
_ABOUT_STAGE = ("name", "run", "from", "once", "arms")
_SPARSITY = "sparsity.sparsity"


@dataclass(frozen=True)
class StageEntry:
    """One stage of a pipeline.

    Args:
        name: names its directory and its entry in the report. run: one of `KINDS`.
        start: the name of the stage whose weights it starts from, written ``from:``; None for a fresh model.
        once: whether it is run once for the pipeline, and not in every arm.
        arms: the names of the arms that have it; empty for all.
        settings: those of its kind that differ from the pipeline's, or from its kind's defaults.
    """

    name: str
    run: str
    start: str | None = None
    once: bool = False
    arms: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class PipelineSection:
    """Which arms and stages a pipeline has.

    Args:
        arms: settings by their dotted names, each with a list of values; there is an arm for every combination.
            ``sparsity.sparsity: [0, 0.75]`` gives a dense arm, which has no other setting of ``sparsity``, and a
            sparse one.
        stages: a list. An entry has a ``name``; ``run``, which is pretrain, finetune or prompt, and by default the
            name; ``from``, the name of the stage whose weights it starts from; ``once: true`` for a stage that is not
            repeated in every arm; ``arms``, the names of the arms that have it, such as [sparse-0.75], all of them by
            default; and settings of what it runs. Pre-training takes the sections ``optimizer``,
            ``schedule``, ``budget`` and ``loop`` of the pipeline, the others those of their own verb.
    """

    arms: dict[str, Any] = field(default_factory=dict)
    stages: list[Any] = field(default_factory=list)


@dataclass
class PipelineConfig(RunConfig):
    """Run a list of stages in several arms, and report what that cost and saved.

    The sections at the top (``optimizer``, ``schedule``, ``budget``, ``loop``) are those of pre-training.
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    pipeline: PipelineSection = field(default_factory=PipelineSection)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_from is not None:
            raise UserError(f"init_from={self.init_from}: a pipeline makes its own models; use finetune or prompt")
        self.pipeline = PipelineSection(**canonical(vars(self.pipeline)))
        names = [arm.name for arm in self.arms]
        for entry in self.stages:
            for name in entry.arms:
                if name not in names:
                    raise UserError(
                        f"pipeline.stages: {entry.name}: arms: no arm is called {name}{nearest(name, names)}; there "
                        f"are {', '.join(names)}"
                    )
        shared = {entry.name for entry in self.stages if entry.once}
        for arm in self.arms:
            own = self.of_arm(arm)
            there = shared | {entry.name for entry in own}
            for entry in own:
                if entry.start is not None and entry.start not in there:
                    raise UserError(
                        f"pipeline.stages: {entry.name}: from={entry.start} is no stage of the arm {arm.name}"
                    )
                self.stage_config(entry, arm)
        for entry in self.stages:
            if entry.once:
                self.stage_config(entry, None)

    @classmethod
    def canonical(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return plain settings in which a pipeline is written in the one way in which it is compared."""
        section = values.get("pipeline")
        return {**values, "pipeline": canonical(section)} if isinstance(section, Mapping) else dict(values)

    @property
    def stages(self) -> list[StageEntry]:
        """The stages in an order in which each follows the one that it starts from.

        Raises:
            UserError: an entry that is none, a name twice, a ``from`` that names nothing, or a circle.
        """
        return _in_order(list(_entries(self.pipeline.stages)))

    @property
    def arms(self) -> list[Arm]:
        """The arms, one for each combination of settings; those that come out the same count once."""
        return list(dict.fromkeys(_arms(self.pipeline.arms)))

    def of_arm(self, arm: Arm) -> list[StageEntry]:
        """Return the stages that an arm has of its own, in the order of running."""
        return [entry for entry in self.stages if not entry.once and (not entry.arms or arm.name in entry.arms)]

    def stage_config(
        self, entry: StageEntry, arm: Arm | None, init_from: str | None = None, run_dir: str | None = None
    ) -> RunConfig:
        """Return the configuration of a stage of an arm; ``arm`` is None for one that is run once.

        Raises:
            UserError: a setting that the stage does not have, or a value that it refuses; the line names the stage.
        """
        kind = KINDS[entry.run]
        known = {each.name for each in dataclasses.fields(kind)}
        shared = dataclasses.asdict(self)
        taken = known - {"init_from", "run_dir"} - (set() if entry.run == "pretrain" else set(OWN))
        values: dict[str, Any] = {name: shared[name] for name in taken if name in shared}
        for name, value in arm.settings if arm is not None else ():
            if name.partition(".")[0] in taken:
                _set(values, name, value)
        for name in sorted(known - values.keys() - {"init_from", "run_dir"}):
            values[name] = _default(kind, name)
        _merge(values, entry.settings)
        where = f"pipeline.stages: {entry.name}"
        for name in ("sparsity", "budget"):
            if not isinstance(values[name], Mapping):
                raise UserError(f"{where}: {name}={values[name]} must be a section of settings")
        phases = values["budget"].get("phases")
        if phases is not None and not (
            isinstance(phases, list | tuple) and all(isinstance(phase, Mapping) for phase in phases)
        ):
            raise UserError(f"{where}: budget.phases={phases} must be a list of sections of settings")
        if arm is not None and dict(arm.settings).get(_SPARSITY) == 0.0:
            values["budget"] = _without_densities(values["budget"])  # the dense arm is dense throughout
        densities = any(phase.get("density") is not None for phase in values["budget"].get("phases") or [])
        if not densities and not values["sparsity"].get("sparsity") and not values["sparsity"].get("nnz"):
            values["sparsity"] = {**vars(SparsityConfig()), "seed": values["sparsity"].get("seed")}
            values["sparsity"]["evolution"] = {}
        try:
            return build(kind, {**values, "init_from": init_from, "run_dir": run_dir})
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def _without_densities(budget: Mapping[str, Any]) -> dict[str, Any]:
    phases = budget.get("phases")
    return {**budget, "phases": phases and [{**phase, "density": None} for phase in phases]}


def canonical(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section ``pipeline`` whose stages name only settings that are not their kind's defaults.

    Raises:
        UserError: a stage that is none, or an arm that is none.
    """
    arms: dict[str, list[Any]] = {}
    for arm in _arms(section.get("arms") or {}):
        for name, value in arm.settings:
            arms.setdefault(name, []).append(value)
    stages = [_canonical_entry(entry) for entry in _entries(section.get("stages") or [])]
    return {"arms": {name: list(dict.fromkeys(values)) for name, values in arms.items()}, "stages": stages}


def _canonical_entry(entry: StageEntry) -> dict[str, Any]:
    kind = KINDS[entry.run]
    found: dict[str, Any] = {"name": entry.name}
    if entry.run != entry.name:
        found["run"] = entry.run
    if entry.start is not None:
        found["from"] = entry.start
    if entry.once:
        found["once"] = True
    if entry.arms:
        found["arms"] = list(entry.arms)
    shared = {name for name in known_settings(kind) if name not in OWN or entry.run == "pretrain"}
    for name, value in entry.settings.items():
        # What the pipeline's own section says is not known here, so a setting that would change it stays.
        if name in shared and name in RUN_SETTINGS:
            found[name] = value
            continue
        full = complete({name: value}, kind)
        if name in OWN and not isinstance(value, Mapping):
            raise UserError(f"pipeline.stages: {entry.name}: {name}={value} must be a section of settings")
        if name == "budget" and full["budget"]["epochs"] == kind.EPOCHS:
            full["budget"] = {**full["budget"], "epochs": None}
        more = beyond({name: full[name]}, kind)
        if more.get(name, {}) != {}:
            found |= more
    return found


def known_settings(kind: type[RunConfig]) -> set[str]:
    """Return the names of the settings of a kind of stage that a pipeline does not set itself."""
    return {each.name for each in dataclasses.fields(kind)} - set(PLACED)


@dataclass(frozen=True)
class Arm:
    """One combination of the settings of ``pipeline.arms``, as (dotted name, value) pairs."""

    settings: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """What the arm is called in directories and reports: dense, sparse-0.75, or settings and their values."""
        return "_".join(_part(name, value) for name, value in self.settings) or "run"


def _part(name: str, value: Any) -> str:
    if name == _SPARSITY:
        return f"sparse-{value:g}" if value else "dense"
    return f"{name.rpartition('.')[2]}-{value:g}" if isinstance(value, float) else f"{name.rpartition('.')[2]}-{value}"


def _arms(section: Mapping[str, Any]) -> Iterator[Arm]:
    fields = {each.name for each in dataclasses.fields(RunConfig)} - set(PLACED) | {"task"}
    for name, values in section.items():
        if str(name).partition(".")[0] not in fields:
            raise UserError(f"pipeline.arms: {name} is no setting{nearest(str(name).partition('.')[0], fields)}")
        if not isinstance(values, list | tuple) or not values:
            raise UserError(f"pipeline.arms: {name}={values} must be a list of values")
        for value in values:
            if isinstance(value, list | tuple | Mapping):
                raise UserError(f"pipeline.arms: {name}={value} must be a single value")
            if "/" in str(value) or "\\" in str(value):
                raise UserError(f"pipeline.arms: {name}={value} cannot be part of the name of a directory")
            if name in _SECTIONS:
                raise UserError(f"pipeline.arms: {name} is a section; name one of its settings, such as {_SPARSITY}")
            if name == _SPARSITY and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise UserError(f"pipeline.arms: {name}={value} must be a number")
    for chosen in itertools.product(*section.values()):
        settings = zip(map(str, section), chosen, strict=True)
        yield Arm(tuple((name, float(value) if name == _SPARSITY else value) for name, value in settings))


def _entries(listed: Sequence[Any]) -> Iterator[StageEntry]:
    if not listed:
        raise UserError("pipeline.stages=[]: a pipeline has at least one stage, such as {name: pretrain}")
    seen: set[str] = set()
    for index, entry in enumerate(listed):
        where = f"pipeline.stages[{index}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise UserError(f"{where}={entry} must be a stage with a name, such as {{name: pretrain}}")
        name = entry["name"]
        if not name or name in seen or set(name) & set("/\\\0") or name.startswith(".") or name in _TAKEN:
            why = "is the name of an earlier one" if name in seen else "cannot be the name of a directory"
            raise UserError(f"{where}.name={name!r} {why}")
        seen.add(name)
        run = entry.get("run", name)
        if not isinstance(run, str) or run not in KINDS:
            check_choice(f"{where}.run", str(run), tuple(KINDS))
        start, once = entry.get("from"), entry.get("once", False)
        if start is not None and not isinstance(start, str):
            raise UserError(f"{where}.from={start} must be the name of a stage")
        if not isinstance(once, bool):
            raise UserError(f"{where}.once={once!r} must be true or false")
        arms = entry.get("arms") or []
        if not isinstance(arms, list | tuple) or not all(isinstance(arm, str) for arm in arms):
            raise UserError(f"{where}.arms={arms!r} must be a list of names of arms")
        if once and arms:
            raise UserError(f"{where}.arms={list(arms)}: a stage that is run once is in no arm")
        settings = {str(key): value for key, value in entry.items() if key not in _ABOUT_STAGE}
        known = known_settings(KINDS[run])
        for key in settings:
            if key not in known:
                raise UserError(f"{where}.{key} is no setting of {run}{nearest(key, known | set(_ABOUT_STAGE))}")
        if run == "prompt" and start is None:
            raise UserError(f"{where}: a soft prompt is learned for a trained model; say which, from: STAGE")
        yield StageEntry(name, run, start, once, tuple(arms), settings)


def _in_order(entries: Sequence[StageEntry]) -> list[StageEntry]:
    by_name = {entry.name: entry for entry in entries}
    for index, entry in enumerate(entries):
        where = f"pipeline.stages[{index}].from={entry.start}"
        if entry.start is None:
            continue
        if entry.start not in by_name:
            raise UserError(
                f"{where} names no stage{nearest(str(entry.start), by_name)}; there are {', '.join(by_name)}"
            )
        if entry.once and not by_name[entry.start].once:
            raise UserError(f"{where}: a stage that is run once cannot start from one that each arm has its own of")
    ordered: list[StageEntry] = []
    left = list(entries)
    while left:
        done = {entry.name for entry in ordered}
        ready = [entry for entry in left if entry.start is None or entry.start in done]
        if not ready:
            raise UserError(
                f"pipeline.stages: {' from '.join(_circle(left))} is a circle; one of them must start from nothing"
            )
        # One at a time, so that stages keep the order of the list as far as they can.
        ordered.append(ready[0])
        left.remove(ready[0])
    return ordered


def _circle(entries: Sequence[StageEntry]) -> list[str]:
    by_name = {entry.name: entry for entry in entries}
    path = [entries[0].name]
    while (start := by_name[path[-1]].start) not in path:
        assert start is not None
        path.append(start)
    return [*path[path.index(start) :], start]


def _default(kind: type[RunConfig], name: str) -> Any:
    each = next(each for each in dataclasses.fields(kind) if each.name == name)
    value = each.default_factory() if each.default_factory is not dataclasses.MISSING else each.default
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        values[section] = dict(values.get(section) or {})
        values = values[section]
    values[last] = value


def _merge(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Put the settings ``more`` over ``values``, section by section; a length takes the place of another length."""
    for name, value in more.items():
        before = values.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            inner = dict(before)
            if name == "budget" and any(value.get(length) is not None for length in LENGTHS):
                inner |= dict.fromkeys(LENGTHS)
            _merge(inner, value)
            values[name] = inner
        else:
            values[name] = value
