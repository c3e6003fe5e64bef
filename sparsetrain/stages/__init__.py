"""Stages (pre-training, fine-tuning, soft prompts, evaluation), and pipelines of stages."""

from sparsetrain.runs.result import RunResult
from sparsetrain.stages.config import FinetuneConfig, PretrainConfig, PromptConfig
from sparsetrain.stages.evaluate import evaluate
from sparsetrain.stages.evaluate_config import EvaluateConfig
from sparsetrain.stages.finetune import finetune
from sparsetrain.stages.generate import GenerateConfig, generate
from sparsetrain.stages.pipeline import pipeline
from sparsetrain.stages.pipeline_config import PipelineConfig
from sparsetrain.stages.pretrain import pretrain
from sparsetrain.stages.prompt import prompt

__all__ = [
    "EvaluateConfig",
    "FinetuneConfig",
    "GenerateConfig",
    "PipelineConfig",
    "PretrainConfig",
    "PromptConfig",
    "RunResult",
    "evaluate",
    "finetune",
    "generate",
    "pipeline",
    "pretrain",
    "prompt",
]
