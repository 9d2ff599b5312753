"""Run abft-mlx from a checkout: ``python cli.py demo``. Installed, it is ``abft-mlx demo``."""

from abft_mlx.cli import app

if __name__ == "__main__":
    app()
