"""``sparsetrain bench``: how fast sparse layers and models are on this machine, beside dense ones in the same run."""

from sparsetrain.bench.config import BenchConfig, GptSection, ScalingSection
from sparsetrain.bench.run import BenchResult, bench

__all__ = ["BenchConfig", "BenchResult", "GptSection", "ScalingSection", "bench"]
