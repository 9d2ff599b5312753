"""abft-mlx."""
