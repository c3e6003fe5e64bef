"""Stages (pre-training, adaptation, fine-tuning, soft prompts, evaluation), and pipelines of stages."""

from sparsetrain.runs.result import RunResult
from sparsetrain.stages.adapt import adapt
from sparsetrain.stages.config import AdaptConfig, FinetuneConfig, PretrainConfig, PromptConfig
from sparsetrain.stages.evaluate import evaluate
from sparsetrain.stages.evaluate_config import EvaluateConfig
from sparsetrain.stages.finetune import finetune
from sparsetrain.stages.generate import GenerateConfig, generate
from sparsetrain.stages.pipeline import pipeline
from sparsetrain.stages.pipeline_config import PipelineConfig
from sparsetrain.stages.predict import PredictConfig, predict
from sparsetrain.stages.pretrain import pretrain
from sparsetrain.stages.prompt import prompt

__all__ = [
    "AdaptConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "GenerateConfig",
    "PipelineConfig",
    "PredictConfig",
    "PretrainConfig",
    "PromptConfig",
    "RunResult",
    "adapt",
    "evaluate",
    "finetune",
    "generate",
    "pipeline",
    "predict",
    "pretrain",
    "prompt",
]
