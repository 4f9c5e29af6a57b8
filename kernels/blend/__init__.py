"""Blending the gradients of two paths: in one pass, with norms and dot product; the best weight; sketches to estimate it from."""

from longtrace.kernels.blend.alpha import (
    OptimalAlpha,
    PathStatistics,
    RunningStatistics,
    gradient_variance,
    optimal_alpha,
    path_statistics,
)
from longtrace.kernels.blend.dispatch import GradientStats, blend_gradients
from longtrace.kernels.blend.sketch import CountSketch

__all__ = [
    "CountSketch",
    "GradientStats",
    "OptimalAlpha",
    "PathStatistics",
    "RunningStatistics",
    "blend_gradients",
    "gradient_variance",
    "optimal_alpha",
    "path_statistics",
]
