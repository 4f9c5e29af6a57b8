"""Blending the gradients of two paths, with their norms and dot product."""

from longtrace.kernels.blend.dispatch import GradientStats, blend_gradients

__all__ = ["GradientStats", "blend_gradients"]
