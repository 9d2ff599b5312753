"""Adapters on W_Q and W_K: LoRA through mlx-lm's own layers, or these weights themselves.

:func:`attach` freezes a model and makes W_Q and W_K trainable; :func:`save` writes what stock
mlx-lm loads; :func:`load` checks every name and shape first. Trainers pass their gradients through
:func:`mask_gradients`, so that the V part of a fused projection never moves.
"""

from abft_mlx.adapters.attach import adapted, attach, detach, train_mode
from abft_mlx.adapters.files import CONFIG, WEIGHTS, load, save, tensors
from abft_mlx.adapters.masks import gradient_mask, mask_gradients, trainable_parameters
from abft_mlx.adapters.strength import merge, scale

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "adapted",
    "attach",
    "detach",
    "gradient_mask",
    "load",
    "mask_gradients",
    "merge",
    "save",
    "scale",
    "tensors",
    "train_mode",
    "trainable_parameters",
]
