"""The configuration of a pipeline: stages that start from each other, and arms as a product over settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsetrain.data import TaskConfig
from sparsetrain.errors import UserError, check_choice, nearest
from sparsetrain.optim import LENGTHS
from sparsetrain.runs.identity import beyond
from sparsetrain.runs.layout import CONFIG, PAGE, REPORT, RESULT
from sparsetrain.runs.recorded import complete
from sparsetrain.settings import build
from sparsetrain.sparsity import SparsityConfig
from sparsetrain.sparsity.config import of_rule
from sparsetrain.stages.config import RunConfig, StageConfig
from sparsetrain.stages.evaluate_config import EvaluateConfig
from sparsetrain.stages.kinds import KINDS, OWN, RUN_SETTINGS, known_settings
from sparsetrain.stages.pipeline_arms import SPARSITY, Arm, arms_of, canonical_arms, set_setting

_TAKEN = (CONFIG, RESULT, REPORT, PAGE)  # files that lie beside the directories of stages and arms
_ABOUT_STAGE = ("name", "run", "from", "once", "arms")
_NEED_START = {"prompt": "a soft prompt", "adapt": "an adaptation", "evaluate": "an evaluation"}
_RULE = "sparsity.evolution.rule"


@dataclass(frozen=True)
class StageEntry:
    """One stage of a pipeline.

    Args:
        name: name of its directory and of its entry in the report.
        run: its kind, one of `KINDS`.
        start: name of the stage whose weights it starts from (``from:`` in the file); None for a fresh model.
        once: whether it runs once for the pipeline instead of once per arm.
        arms: names of the arms that include it; empty for all.
        settings: settings that differ from the pipeline's, or from the defaults of its kind.
    """

    name: str
    run: str
    start: str | None = None
    once: bool = False
    arms: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class PipelineSection:
    """The arms and stages of a pipeline.

    Args:
        arms: dotted names of settings, each with a list of values, and names of choices, each with several settings
            by name: ``recipe: {long: {data.context: 512}, short: {data.context: 128}}``. Every combination is an arm.
            ``sparsity.sparsity: [0, 0.75]`` gives a sparse arm and a dense one, which ignores the rest of ``sparsity``.
        stages: a list of entries. Each has a ``name``; ``run`` (pretrain, adapt, finetune, prompt or evaluate; default:
            the name); ``from``, the stage whose weights it starts from or measures; ``once: true`` if it should not be
            repeated in every arm; ``arms``, the names of the arms that include it, such as [sparse-0.75]
            (default: all); and settings of its kind. Pre-training takes the sections ``optimizer``, ``schedule``,
            ``budget`` and ``loop`` of the pipeline; the other kinds take the defaults of their own verb.
    """

    arms: dict[str, Any] = field(default_factory=dict)
    stages: list[Any] = field(default_factory=list)


@dataclass
class PipelineConfig(RunConfig):
    """Run a list of stages in several arms, and report their costs and results.

    The sections ``optimizer``, ``schedule``, ``budget`` and ``loop`` at the top level apply to pre-training.
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
                        f"pipeline.stages: {entry.name}: from={entry.start} is not a stage of the arm {arm.name}"
                    )
                self.stage_config(entry, arm)
        for entry in self.stages:
            if entry.once:
                self.stage_config(entry, None)

    @classmethod
    def canonical(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return plain settings with the pipeline in its canonical form, in which configurations are compared."""
        section = values.get("pipeline")
        return {**values, "pipeline": canonical(section)} if isinstance(section, Mapping) else dict(values)

    @property
    def stages(self) -> list[StageEntry]:
        """The stages, ordered so that each comes after the one that it starts from.

        Raises:
            UserError: an entry is not a stage, a name occurs twice, a ``from`` names no stage, or they form a cycle.
        """
        return _in_order(list(_entries(self.pipeline.stages)))

    @property
    def arms(self) -> list[Arm]:
        """The arms, one for each distinct combination of settings."""
        return arms_of(self.pipeline.arms)

    def of_arm(self, arm: Arm) -> list[StageEntry]:
        """Return the stages that run in an arm, in running order."""
        return [entry for entry in self.stages if not entry.once and (not entry.arms or arm.name in entry.arms)]

    def stage_config(
        self, entry: StageEntry, arm: Arm | None, init_from: str | None = None, run_dir: str | None = None
    ) -> StageConfig:
        """Return the configuration of a stage in an arm; ``arm`` is None for a stage that runs once.

        Raises:
            UserError: the stage does not have a setting, or refuses a value; the message names the stage.
        """
        kind = KINDS[entry.run]
        known = {each.name for each in dataclasses.fields(kind)}
        shared = dataclasses.asdict(self)
        taken = known - {"init_from", "run_dir"} - (set() if entry.run == "pretrain" else set(OWN))
        if kind is EvaluateConfig and "data" not in entry.settings:
            taken.remove("data")  # it reads the text of the run that it measures
        values: dict[str, Any] = {name: shared[name] for name in taken if name in shared}
        for name, value in arm.settings if arm is not None else ():
            if name.partition(".")[0] in taken:
                set_setting(values, name, value)
                if name == _RULE:
                    values["sparsity"]["evolution"] = of_rule(values["sparsity"]["evolution"])
        for name in sorted(known - values.keys() - {"init_from", "run_dir"}):
            values[name] = _default(kind, name)
        if entry.run == "adapt":  # a given tokenizer would replace that of the start
            values["data"] = {**values["data"], "tokenizer_path": None}
        _merge(values, entry.settings)
        where = f"pipeline.stages: {entry.name}"
        if issubclass(kind, RunConfig):
            _settle_training(values, arm, where)
        try:
            return build(kind, {**values, "init_from": init_from, "run_dir": run_dir})
        except UserError as error:
            raise UserError(f"{where}: {error}") from None


def _settle_training(values: dict[str, Any], arm: Arm | None, where: str) -> None:
    """Make the settings of a training dense where its arm is, or where it has no sparsity.

    Raises:
        UserError: a section is none; the line begins with ``where``.
    """
    for name in ("sparsity", "budget"):
        if not isinstance(values[name], Mapping):
            raise UserError(f"{where}: {name}={values[name]} must be a section of settings")
    phases = values["budget"].get("phases")
    if phases is not None and not (
        isinstance(phases, list | tuple) and all(isinstance(phase, Mapping) for phase in phases)
    ):
        raise UserError(f"{where}: budget.phases={phases} must be a list of sections of settings")
    if arm is not None and dict(arm.settings).get(SPARSITY) == 0.0:
        values["budget"] = _without_densities(values["budget"])  # phases cannot make the dense arm sparse
    densities = any(phase.get("density") is not None for phase in values["budget"].get("phases") or [])
    if not densities and not values["sparsity"].get("sparsity") and not values["sparsity"].get("nnz"):
        values["sparsity"] = {**vars(SparsityConfig()), "seed": values["sparsity"].get("seed")}
        values["sparsity"]["evolution"] = {}


def _without_densities(budget: Mapping[str, Any]) -> dict[str, Any]:
    phases = budget.get("phases")
    return {**budget, "phases": phases and [{**phase, "density": None} for phase in phases]}


def canonical(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section ``pipeline`` in canonical form: its stages omit settings equal to the defaults of their kind.

    Raises:
        UserError: a stage or an arm is invalid.
    """
    stages = [_canonical_entry(entry) for entry in _entries(section.get("stages") or [])]
    return {"arms": canonical_arms(section.get("arms") or {}), "stages": stages}


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
        # The pipeline's own value is unknown here, so even a default may override it and must stay.
        if name in shared and name in RUN_SETTINGS:
            found[name] = value
            continue
        full = complete({name: value}, kind)
        if name in OWN and not isinstance(value, Mapping):
            raise UserError(f"pipeline.stages: {entry.name}: {name}={value} must be a section of settings")
        if name == "budget" and issubclass(kind, RunConfig) and full["budget"]["epochs"] == kind.EPOCHS:
            full["budget"] = {**full["budget"], "epochs": None}
        more = beyond({name: full[name]}, kind)
        if more.get(name, {}) != {}:
            found |= more
    return found


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
            why = "is the name of an earlier stage" if name in seen else "cannot be a directory name"
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
            raise UserError(f"{where}.arms={arms!r} must be a list of arm names")
        if once and arms:
            raise UserError(f"{where}.arms={list(arms)}: a stage with once=true runs in no arm; remove arms or once")
        settings = {str(key): value for key, value in entry.items() if key not in _ABOUT_STAGE}
        known = known_settings(KINDS[run])
        for key in settings:
            if key not in known:
                others = [other for other, kind in KINDS.items() if key in known_settings(kind)]
                hint = f"; it is one of {', '.join(others)}" if others else nearest(key, known | set(_ABOUT_STAGE))
                raise UserError(f"{where}.{key} is not a setting of {run}{hint}")
        if run in _NEED_START and start is None:
            raise UserError(f"{where}: {_NEED_START[run]} needs a trained model; add from: STAGE")
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
        if by_name[entry.start].run == "evaluate":
            raise UserError(f"{where} is an evaluation, which has no weights to start from")
        if entry.once and not by_name[entry.start].once:
            raise UserError(f"{where}: a stage with once=true cannot start from a stage that runs in every arm")
    ordered: list[StageEntry] = []
    left = list(entries)
    while left:
        done = {entry.name for entry in ordered}
        ready = [entry for entry in left if entry.start is None or entry.start in done]
        if not ready:
            raise UserError(
                f"pipeline.stages: {' from '.join(_circle(left))} is a cycle; one of them must start without from"
            )
        # One at a time, to keep the order of the list where possible.
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


def _default(kind: type[StageConfig], name: str) -> Any:
    each = next(each for each in dataclasses.fields(kind) if each.name == name)
    value = each.default_factory() if each.default_factory is not dataclasses.MISSING else each.default
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def _merge(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Merge the settings ``more`` into ``values``, section by section.

    A length replaces a length given in another unit, a rule drops the settings of another rule, and a task
    the settings that are special to another task.
    """
    for name, value in more.items():
        before = values.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            inner = dict(before)
            if name == "budget" and any(value.get(length) is not None for length in LENGTHS):
                inner |= dict.fromkeys(LENGTHS)
            if name == "evolution" and "rule" in value:
                inner = of_rule({**inner, "rule": value["rule"]})
            if name == "task":
                inner = TaskConfig.renamed(inner, value.get("name"))
            _merge(inner, value)
            values[name] = inner
        else:
            values[name] = value
