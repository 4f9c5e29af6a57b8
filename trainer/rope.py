"""Context extension through transformers' own rope settings, so the saved config carries it to every server."""

from __future__ import annotations

from transformers import PretrainedConfig

from .config import Refusal


def extend_rope(config: PretrainedConfig, max_tokens: int, method: str) -> str:
    """Changes `config` in place so that positions up to `max_tokens` are in its window; returns what was done.

    linear stretches positions (Chen et al. 2023, 2306.15595); ntk raises the base to theta * s^(d/(d-2)), which keeps the
    highest frequency and stretches the lowest by s; yarn blends the two by wavelength and adds a temperature
    (Peng et al. 2023, 2309.00071). Raises Refusal when the window is too short and cannot be stretched as asked.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    # Gemma 3 and others keep one set per layer type; only full attention sees beyond its window
    full = parameters.get("full_attention", parameters)
    kind = full.get("rope_type", "default")
    window = config.max_position_embeddings
    if kind == "yarn":  # some configs keep the original window beside a factor that already extends it
        window = max(window, int(full["factor"] * full["original_max_position_embeddings"]))
    if max_tokens <= window:
        return f"window {window:,}, not extended"
    if method == "none":
        raise Refusal(
            f"--max-tokens {max_tokens:,} exceeds the model's window of {window:,}; pass --rope auto|linear|ntk|yarn or a smaller --max-tokens"
        )
    method = "yarn" if method == "auto" else method
    if not full:
        raise Refusal(f"{config.model_type} has no rope settings to extend from {window:,} to {max_tokens:,} tokens")
    if kind == "yarn" and method == "yarn":
        window = full["original_max_position_embeddings"]
    elif kind != "default":
        raise Refusal(
            f"the model's rope is already scaled ({kind}, window {window:,}); --rope {method} cannot stretch it further to "
            f"{max_tokens:,}: pass --max-tokens {window}"
        )
    factor = max_tokens / window
    if method == "ntk":
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dim = int(dim * full.get("partial_rotary_factor", 1.0))
        full["rope_theta"] *= factor ** (dim / (dim - 2))
    else:
        full.pop("attention_factor", None)  # that of another factor
        full.update(rope_type=method, factor=factor)
        if method == "yarn":
            full["original_max_position_embeddings"] = window
    config.max_position_embeddings = max_tokens
    return f"window extended from {window:,} to {max_tokens:,} tokens by {method} (factor {factor:.4g}), saved in config.json"
