"""Peak memory of one contender in this process: ``python -m abft_mlx.bench SIZE NAME DTYPE``."""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Print one JSON object."""
    from abft_mlx.bench import measure, sizes

    size, name, dtype = sys.argv[1:]
    print(json.dumps({"peak_memory_bytes": measure.peak_here(sizes.parse(size), name, dtype)}))


if __name__ == "__main__":
    main()
