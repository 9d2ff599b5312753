"""The manners of scikit-learn's estimators, without scikit-learn: it is imported when it asks."""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

_Self = TypeVar("_Self", bound="Estimator")


class Estimator:
    """Parameters are the arguments of ``__init__``, kept unchanged under their own names."""

    # What versions of scikit-learn before 1.6 look for.
    _estimator_type = "classifier"

    @classmethod
    def _parameters(cls) -> list[str]:
        return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters as they were given; none of them has parameters of its own.

        Args:
            deep: has no effect.
        """
        del deep
        return {name: getattr(self, name) for name in self._parameters()}

    def set_params(self: _Self, **parameters: Any) -> _Self:
        """Change parameters; what was fitted stays until the next :meth:`fit`.

        Raises:
            ValueError: no such parameter.
        """
        for name in parameters:
            if name not in self._parameters():
                raise ValueError(
                    f"{type(self).__name__} has no parameter {name!r}; there are "
                    f"{', '.join(self._parameters())}"
                )
        for name, value in parameters.items():
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        """Scikit-learn's description of an estimator: a classifier of texts."""
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(one_d_array=True, two_d_array=False, string=True),
        )

    def __repr__(self) -> str:
        """The parameters that are not the defaults."""
        defaults = inspect.signature(type(self).__init__).parameters
        given = [
            f"{name}={value!r}"
            for name, value in self.get_params().items()
            if value is not defaults[name].default
        ]
        return f"{type(self).__name__}({', '.join(given)})"
