"""Prompts that begin alike: what they share is computed once, with its gradient or without."""

from abft_mlx.prefix.cached import Prefix, Prefixes, cacheable
from abft_mlx.prefix.shared import (
    AttendedPrefix,
    PrefixKeys,
    common_prefix,
    forward,
    prefix_caches,
    shareable,
)

__all__ = [
    "AttendedPrefix",
    "Prefix",
    "PrefixKeys",
    "Prefixes",
    "cacheable",
    "common_prefix",
    "forward",
    "prefix_caches",
    "shareable",
]
