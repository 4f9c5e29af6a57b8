"""Fused kernels for training on long traces; the public names of `longtrace.kernels`."""

if __name__ == "kernels":
    # With the clone's root on sys.path a bare `import kernels` lands here, and transformers asks for PyPI's package of
    # that name, without a guard. Hand over to that package where it is installed; else look like the bare folder we are.
    import os
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    _root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    _spec = PathFinder.find_spec("kernels", [p for p in sys.path if os.path.realpath(p or os.curdir) != _root])
    if _spec is not None and _spec.loader is not None:
        _module = sys.modules["kernels"] = module_from_spec(_spec)
        _spec.loader.exec_module(_module)
    __file__ = None  # transformers takes a package with neither a version nor a file for "not installed"
    __path__ = []

    def __getattr__(name: str):
        raise AttributeError(f"no {name!r} here: this is the folder of longtrace.kernels; import longtrace.kernels")

else:
    from importlib.metadata import version

    from longtrace.kernels.advantages import Advantages, group_advantages
    from longtrace.kernels.attention import register_attention, varlen_attention
    from longtrace.kernels.blend import (
        CountSketch,
        GradientStats,
        OptimalAlpha,
        PathStatistics,
        RunningStatistics,
        blend_gradients,
        gradient_variance,
        optimal_alpha,
        path_statistics,
    )
    from longtrace.kernels.explain import explain
    from longtrace.kernels.head import (
        LogProbs,
        linear_cross_entropy,
        linear_log_prob,
        linear_weighted_nll,
        plan_chunks,
    )
    from longtrace.kernels.layers import geglu, patch, patched, rms_norm, rope, swiglu, unpatch
    from longtrace.kernels.packing import pack

    __version__ = version("longtrace")
    __all__ = [
        "Advantages",
        "CountSketch",
        "GradientStats",
        "LogProbs",
        "OptimalAlpha",
        "PathStatistics",
        "RunningStatistics",
        "blend_gradients",
        "explain",
        "geglu",
        "gradient_variance",
        "group_advantages",
        "linear_cross_entropy",
        "linear_log_prob",
        "linear_weighted_nll",
        "optimal_alpha",
        "pack",
        "patch",
        "patched",
        "path_statistics",
        "plan_chunks",
        "register_attention",
        "rms_norm",
        "rope",
        "swiglu",
        "unpatch",
        "varlen_attention",
    ]
