"""Few-shot classifiers as estimators: what a Python program fits, asks and cross-validates."""

from abft_mlx.classifier.few_shot import Classifier

__all__ = ["Classifier"]
