"""Pre-training, fine-tuning, soft prompts, the pipeline that runs them at several sparsities, and coordinate checks."""

from sparsetrain.stages.config import FinetuneConfig, PipelineConfig, PretrainConfig, PromptConfig
from sparsetrain.stages.coordinates import CoordinatesConfig, coord_check
from sparsetrain.stages.finetune import finetune
from sparsetrain.stages.generate import GenerateConfig, generate
from sparsetrain.stages.pipeline import pipeline
from sparsetrain.stages.pretrain import pretrain
from sparsetrain.stages.prompt import prompt
from sparsetrain.stages.run import RunResult

__all__ = [
    "CoordinatesConfig",
    "FinetuneConfig",
    "GenerateConfig",
    "PipelineConfig",
    "PretrainConfig",
    "PromptConfig",
    "RunResult",
    "coord_check",
    "finetune",
    "generate",
    "pipeline",
    "pretrain",
    "prompt",
]
