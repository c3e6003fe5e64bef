"""Stages of training (pre-training, adaptation, fine-tuning, soft prompts), and pipelines of stages."""

from sparsetrain.runs.result import RunResult
from sparsetrain.stages.adapt import adapt
from sparsetrain.stages.config import AdaptConfig, FinetuneConfig, PretrainConfig, PromptConfig
from sparsetrain.stages.finetune import finetune
from sparsetrain.stages.generate import GenerateConfig, generate
from sparsetrain.stages.pipeline import pipeline
from sparsetrain.stages.pipeline_config import PipelineConfig
from sparsetrain.stages.pretrain import pretrain
from sparsetrain.stages.prompt import prompt

__all__ = [
    "AdaptConfig",
    "FinetuneConfig",
    "GenerateConfig",
    "PipelineConfig",
    "PretrainConfig",
    "PromptConfig",
    "RunResult",
    "adapt",
    "finetune",
    "generate",
    "pipeline",
    "pretrain",
    "prompt",
]
