"""Learning-rate schedules, and the laws that relate them to batch size and weight decay."""

from sparsetrain.optim.optimizer import OptimizerConfig, build_optimizer
from sparsetrain.optim.schedule import SCHEDULES, Schedule, ScheduleConfig

__all__ = ["SCHEDULES", "OptimizerConfig", "Schedule", "ScheduleConfig", "build_optimizer"]
