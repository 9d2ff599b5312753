"""A model's activation functions: found in its modules, wrapped for a while, quick on any device.

MLX's exponential takes ten to twenty-five nanoseconds a number on an x86 processor, more than a
number's share of the matrix products around it; its power takes less than half, to the same
accuracy. So there :func:`quick` computes sigmoids by powers. On every other device, and in half
precision, functions are MLX's own.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations as own

from abft_mlx import ports

Around = Callable[[Callable[..., mx.array]], Callable[..., mx.array]]
"""Gives what runs in place of a function of arrays."""

# Activation functions of mlx.nn and mlx-lm, by the names under which modules find them.
ACTIVATIONS = (
    "gelu",
    "gelu_approx",
    "gelu_fast_approx",
    "precise_swiglu",
    "relu2",
    "silu",
    "swiglu",
    "swiglu_oai",
)
# 1 + tanh(z) is 2 sigmoid(2 z).
SLOPE, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


@contextmanager
def replaced(model: nn.Module, around: Around) -> Iterator[None]:
    """Put something around this model's activation functions while the block runs.

    The model's own code runs: its modules find other functions under the names of activation
    functions. Other models are untouched.

    Args:
        model: a loaded model.
        around: given a function of arrays alone, what is to run in its place: :func:`quick`,
            :func:`abft_mlx.recompute.again`, or what stands for it.
    """
    found = {
        number: module
        for number, module in enumerate(model.modules())
        if _activations(type(module))
    }
    made: dict[type, type] = {}

    def make(_: int, kind: type) -> type:
        if kind not in made:
            call = kind.__call__
            assert isinstance(call, FunctionType)
            changed = _activations(kind)
            for name, one in changed.items():
                inner = {name: _wrapped(around, here) for name, here in _inside(one, call).items()}
                changed[name] = ports.Namespace(one, **inner) if inner else _wrapped(around, one)
            made[kind] = ports.subclass(kind, __call__=ports.finding(call, changed))
        return made[kind]

    with ports.swapped(found, make):
        yield


@contextmanager
def quickly(model: nn.Module, *, exportable: bool = False) -> Iterator[None]:
    """Let this model compute its activation functions by :func:`quick` while the block runs."""
    around = partial(quick, exportable=exportable)
    with replaced(model, around) if _slow_exponentials() else nullcontext():
        yield


def quick(
    function: Callable[..., mx.array], *, exportable: bool = False
) -> Callable[..., mx.array]:
    """The same function, computed in another way where MLX's own takes long.

    Args:
        function: an activation function or a ``partial`` of one; any other is given back.
        exportable: in operations that ``mx.export_function`` can describe, whose gradient is MLX's
            and takes more than that of the other.
    """
    plain = plain_function(function)
    if not _slow_exponentials() or plain not in _by_sigmoid():
        return function
    options = function.keywords if isinstance(function, partial) else {}
    other = _by_sigmoid(exportable)[plain]

    def call(*arrays: mx.array) -> mx.array:
        single = all(one.dtype == mx.float32 for one in arrays)
        return other(*arrays, **options) if single else function(*arrays)

    return call


def _slow_exponentials() -> bool:
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return on_x86 and mx.default_device() == mx.Device(mx.cpu)


def plain_function(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """What a ``partial`` is of; any other function itself."""
    return function.func if isinstance(function, partial) else function


def own_gradients() -> dict[Callable[..., mx.array], Callable[[mx.array, mx.array], mx.array]]:
    """Functions of one argument whose gradient :func:`quick` writes down, in single precision.

    Returns:
        For each function what makes its argument's gradient from the argument and the gradient of
        its result; empty where functions are MLX's own.
    """
    return {nn.gelu_approx: _gelu_gradient} if _slow_exponentials() else {}


@cache
def _by_sigmoid(
    exportable: bool = False,
) -> dict[Callable[..., mx.array], Callable[..., mx.array]]:
    """Functions that are little more than a sigmoid, written with :func:`_by_power`."""
    sigmoid, gelu = (_by_power, _gelu) if exportable else (_sigmoid(), _gelu_approx())

    def swiglu_oai(
        gate: mx.array, x: mx.array, alpha: float = 1.702, limit: float = 7.0
    ) -> mx.array:
        gate = mx.minimum(gate, limit)
        return (mx.clip(x, -limit, limit) + 1.0) * (gate * sigmoid(alpha * gate))

    found: dict[Callable[..., mx.array], Callable[..., mx.array]] = {
        nn.silu: lambda x: x * sigmoid(x),
        nn.gelu_approx: gelu,
        nn.gelu_fast_approx: lambda x: x * sigmoid(1.702 * x),
        own.swiglu: lambda gate, x: gate * sigmoid(gate) * x,
    }
    # The last mlx-lm for Python 3.10 has it in the one model that uses it.
    if hasattr(own, "swiglu_oai"):
        found[own.swiglu_oai] = swiglu_oai
    return found


@cache
def _sigmoid() -> Callable[[mx.array], mx.array]:
    @mx.custom_function
    def sigmoid(x: mx.array) -> mx.array:
        return _by_power(x)

    # Left to itself, the derivative divides twice, and is not a number where the power overflows.
    @sigmoid.vjp
    def _(_: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return cotangent * (output * (1 - output))

    return sigmoid


@cache
def _gelu_approx() -> Callable[[mx.array], mx.array]:
    @mx.custom_function
    def gelu(x: mx.array) -> mx.array:
        return _gelu(x)

    # Left to itself, the derivative of the cube holds more arrays than MLX's own function does.
    @gelu.vjp
    def _(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return _gelu_gradient(x, cotangent)

    return gelu


def _gelu(x: mx.array) -> mx.array:
    return x * _gelu_sigmoid(x)


def _gelu_gradient(x: mx.array, cotangent: mx.array) -> mx.array:
    one = _gelu_sigmoid(x)
    return cotangent * (one + one * (1 - one) * x * (SLOPE + 3 * SLOPE * CUBIC * (x * x)))


def _gelu_sigmoid(x: mx.array) -> mx.array:
    return _by_power(x * (SLOPE + SLOPE * CUBIC * (x * x)))


def _by_power(x: mx.array) -> mx.array:
    return 1 / (1 + mx.power(math.e, -x))


def _activations(kind: Any) -> dict[str, Any]:
    """Activation functions that a module's code finds among its globals, and modules of them."""
    call = kind.__call__
    if not isinstance(call, FunctionType):
        return {}
    around = {name: call.__globals__.get(name) for name in call.__code__.co_names}
    direct = {name: one for name, one in around.items() if name in ACTIVATIONS and callable(one)}
    modules = {name: one for name, one in around.items() if one is nn and _inside(one, call)}
    return direct | modules


def _wrapped(around: Around, function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def call(*arrays: mx.array, **options: Any) -> mx.array:
        return around(partial(function, **options))(*arrays)

    return call


def _inside(module: Any, call: FunctionType) -> dict[str, Any]:
    """Activation functions that code finds in ``mlx.nn``."""
    if module is not nn:
        return {}
    return {name: getattr(nn, name) for name in call.__code__.co_names if name in ACTIVATIONS}
