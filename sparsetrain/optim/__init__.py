"""The budget of a run (length and phases), its optimizer, and its learning-rate schedule."""

from sparsetrain.optim.batch_size import BatchSizeConfig, BatchStepConfig, Decision
from sparsetrain.optim.budget import Budget, Phase
from sparsetrain.optim.budget_config import LENGTHS, BudgetConfig, PhaseConfig
from sparsetrain.optim.optimizer import OptimizerConfig, SettingSchedules, build_optimizer
from sparsetrain.optim.run_schedule import RunSchedule
from sparsetrain.optim.schedule import SCHEDULES, Schedule, ScheduleConfig, register_schedule
from sparsetrain.optim.segments import SEGMENTS, SegmentConfig
from sparsetrain.optim.timescale import ema_coefficients, timescale, weight_decay_for

__all__ = [
    "LENGTHS",
    "SCHEDULES",
    "SEGMENTS",
    "BatchSizeConfig",
    "BatchStepConfig",
    "Budget",
    "BudgetConfig",
    "Decision",
    "OptimizerConfig",
    "Phase",
    "PhaseConfig",
    "RunSchedule",
    "Schedule",
    "ScheduleConfig",
    "SegmentConfig",
    "SettingSchedules",
    "build_optimizer",
    "ema_coefficients",
    "register_schedule",
    "timescale",
    "weight_decay_for",
]
