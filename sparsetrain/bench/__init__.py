"""``sparsetrain bench``: the speed of sparse layers and models on this machine, beside dense ones in the same run."""

from sparsetrain.bench.config import BenchConfig, DecodingSection, GptSection, ScalingSection
from sparsetrain.bench.run import BenchResult, bench

__all__ = ["BenchConfig", "BenchResult", "DecodingSection", "GptSection", "ScalingSection", "bench"]
