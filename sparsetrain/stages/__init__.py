"""Pre-training, fine-tuning, soft prompts, the pipeline that runs them at several sparsities, and coordinate checks."""

from sparsetrain.runs.result import RunResult
from sparsetrain.stages.config import FinetuneConfig, PretrainConfig, PromptConfig
from sparsetrain.stages.coordinates import CoordinatesConfig, coord_check
from sparsetrain.stages.finetune import finetune
from sparsetrain.stages.generate import GenerateConfig, generate
from sparsetrain.stages.pipeline import pipeline
from sparsetrain.stages.pipeline_config import PipelineConfig
from sparsetrain.stages.pretrain import pretrain
from sparsetrain.stages.prompt import prompt
from sparsetrain.stages.tune import TuneConfig, tune

__all__ = [
    "CoordinatesConfig",
    "FinetuneConfig",
    "GenerateConfig",
    "PipelineConfig",
    "PretrainConfig",
    "PromptConfig",
    "RunResult",
    "TuneConfig",
    "coord_check",
    "finetune",
    "generate",
    "pipeline",
    "pretrain",
    "prompt",
    "tune",
]
