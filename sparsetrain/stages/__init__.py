"""Stages of training (pre-training, fine-tuning, soft prompts), and pipelines of stages."""

from sparsetrain.runs.result import RunResult
from sparsetrain.stages.config import FinetuneConfig, PretrainConfig, PromptConfig
from sparsetrain.stages.finetune import finetune
from sparsetrain.stages.generate import GenerateConfig, generate
from sparsetrain.stages.pipeline import pipeline
from sparsetrain.stages.pipeline_config import PipelineConfig
from sparsetrain.stages.pretrain import pretrain
from sparsetrain.stages.prompt import prompt

__all__ = [
    "FinetuneConfig",
    "GenerateConfig",
    "PipelineConfig",
    "PretrainConfig",
    "PromptConfig",
    "RunResult",
    "finetune",
    "generate",
    "pipeline",
    "pretrain",
    "prompt",
]
