"""Adapters on W_Q and W_K: LoRA through mlx-lm's own layers, or these weights themselves.

The LM head trains with them where it is asked for. :func:`attach` freezes a model and makes these
weights trainable; :func:`save` writes what stock mlx-lm loads; :func:`load` checks every name and
shape first, and takes PEFT's LoRA, too; :func:`combine` puts several adapters on at once, each with
a factor. Trainers pass their gradients through :func:`mask_gradients`, so that the V part of a
fused projection never moves.
"""

from abft_mlx.adapters.aside import without
from abft_mlx.adapters.attach import adapted, attach, detach, place, train_mode, trained_layers
from abft_mlx.adapters.combine import combine
from abft_mlx.adapters.files import CONFIG, FACTORS, WEIGHTS, save, tensors
from abft_mlx.adapters.folder import base_model
from abft_mlx.adapters.layers import FullLinear
from abft_mlx.adapters.masks import gradient_mask, mask_gradients, trainable_parameters
from abft_mlx.adapters.reading import load
from abft_mlx.adapters.shift import shift_norms
from abft_mlx.adapters.source import Named, Source, find, local_folder
from abft_mlx.adapters.strength import merge, scale

__all__ = [
    "CONFIG",
    "FACTORS",
    "WEIGHTS",
    "FullLinear",
    "Named",
    "Source",
    "adapted",
    "attach",
    "base_model",
    "combine",
    "detach",
    "find",
    "gradient_mask",
    "load",
    "local_folder",
    "mask_gradients",
    "merge",
    "place",
    "save",
    "scale",
    "shift_norms",
    "tensors",
    "train_mode",
    "trainable_parameters",
    "trained_layers",
    "without",
]
