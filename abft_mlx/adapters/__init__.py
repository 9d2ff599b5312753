"""Adapters on W_Q and W_K: LoRA through mlx-lm's own layers, or these weights themselves.

The LM head trains with them where it is asked for. :func:`attach` freezes a model and makes these
weights trainable; :func:`save` writes what stock mlx-lm loads; :func:`load` checks every name and
shape first, and takes PEFT's LoRA, too; :func:`combine` puts several adapters on at once, each with
a factor. Trainers pass their gradients through :func:`mask_gradients`, so that the V part of a
fused projection never moves.
"""

from abft_mlx.adapters.files import (
    CONFIG,
    FACTORS,
    WEIGHTS,
    Named,
    Source,
    base_model,
    combine,
    find,
    load,
    local_folder,
    save,
    tensors,
)
from abft_mlx.adapters.lora import (
    FullLinear,
    adapted,
    attach,
    detach,
    gradient_mask,
    mask_gradients,
    merge,
    scale,
    shift_norms,
    train_mode,
    trainable_parameters,
    trained_layers,
    without,
)

__all__ = [
    "CONFIG", "FACTORS", "WEIGHTS", "FullLinear", "Named", "Source", "adapted", "attach",
    "base_model", "combine", "detach", "find", "gradient_mask", "load", "local_folder",
    "mask_gradients", "merge", "save", "scale", "shift_norms", "tensors", "train_mode",
    "trainable_parameters", "trained_layers", "without",
]  # fmt: skip
