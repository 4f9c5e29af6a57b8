"""The layers around attention and the head: RMSNorm, rotary embedding, gated activations; `patch` puts them in a model."""

from longtrace.kernels.layers.dispatch import geglu, rms_norm, rope, swiglu
from longtrace.kernels.layers.patch import patch, patched, unpatch

__all__ = ["geglu", "patch", "patched", "rms_norm", "rope", "swiglu", "unpatch"]
