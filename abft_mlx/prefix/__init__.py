"""Prompts that begin alike: what they share is computed once, with its gradient or without."""

from abft_mlx.prefix.beginnings import Group, common_prefix, groups
from abft_mlx.prefix.cached import Prefix, Prefixes, cacheable
from abft_mlx.prefix.shared import AttendedPrefix, PrefixKeys, forward, prefix_caches, shareable

__all__ = [
    "AttendedPrefix",
    "Group",
    "Prefix",
    "PrefixKeys",
    "Prefixes",
    "cacheable",
    "common_prefix",
    "forward",
    "groups",
    "prefix_caches",
    "shareable",
]
