"""Side by side: an ABFT step, mlx-lm's step, the paper's way in PyTorch, and the limit."""
