"""What differs between architectures: where W_Q and W_K live, how heads are grouped, stem and head.

A port is data. :func:`port_for` finds the one that describes a loaded model, or says which
architectures have one.
"""

from abft_mlx.ports.hooks import (
    Around,
    Hook,
    Namespace,
    finding,
    hook_blocks,
    subclass,
    swapped,
    wrap_blocks,
)
from abft_mlx.ports.port import (
    Block,
    HeadShape,
    Port,
    Projection,
    architecture,
    base_linear,
    has,
    head_rows,
    output_dims,
    resolve,
)
from abft_mlx.ports.table import (
    PORTS,
    head_counts,
    heads,
    port_for,
    supported,
    supported_in_words,
)

__all__ = [
    "PORTS", "Around", "Block", "HeadShape", "Hook", "Namespace", "Port", "Projection",
    "architecture", "base_linear", "finding", "has", "head_counts", "head_rows", "heads",
    "hook_blocks", "output_dims", "port_for", "resolve", "subclass", "supported",
    "supported_in_words", "swapped", "wrap_blocks",
]  # fmt: skip
