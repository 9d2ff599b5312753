"""The BLAS that is chosen before MLX loads, and the facts about the machine."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from abft_mlx import runtime


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Linux process in which nothing was chosen and MLX is not there yet."""
    monkeypatch.setattr(runtime, "_choice", None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.delenv(runtime.BLAS_VARIABLE, raising=False)
    monkeypatch.delenv(runtime.KERNEL_VARIABLE, raising=False)
    monkeypatch.setattr(runtime, "_cpu_flags", set)


class Loader:
    """Stands for ctypes.CDLL: knows some libraries, remembers what was asked of it."""

    def __init__(self, **symbols: list[str]) -> None:
        self.known = symbols
        self.asked: list[tuple[str, int]] = []

    def __call__(self, path: str, mode: int) -> SimpleNamespace:
        self.asked.append((path, mode))
        if path not in self.known:
            raise OSError("no such file")
        return SimpleNamespace(**dict.fromkeys(self.known[path]))


def use(monkeypatch: pytest.MonkeyPatch, loader: Loader, candidates: list[str]) -> None:
    monkeypatch.setattr(ctypes, "CDLL", loader)
    monkeypatch.setattr(runtime, "_candidates", lambda: [(one, "found") for one in candidates])


@pytest.mark.usefixtures("fresh")
class TestPrepare:
    def test_loads_the_first_that_works_for_all_later_libraries(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loader = Loader(slow=["sgemm_"], good=["cblas_sgemm"], other=["cblas_sgemm"])
        use(monkeypatch, loader, ["missing", "slow", "good", "other"])
        choice = runtime.prepare()
        assert choice == runtime.BlasChoice("good", "found")
        assert loader.asked[-1] == ("good", ctypes.RTLD_GLOBAL)

    def test_says_why_none_of_those_found_will_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        use(monkeypatch, Loader(slow=[]), ["missing", "slow"])
        assert runtime.prepare().note == "missing: no such file; slow: has no cblas_sgemm"

    def test_variable_names_the_only_candidate(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(runtime.BLAS_VARIABLE, "/opt/mine.so")
        loader = Loader(**{"/opt/mine.so": ["cblas_sgemm"]})
        monkeypatch.setattr(ctypes, "CDLL", loader)
        choice = runtime.prepare()
        assert choice == runtime.BlasChoice("/opt/mine.so", "named by ABFT_MLX_BLAS")

    def test_variable_switches_it_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(runtime.BLAS_VARIABLE, "none")
        monkeypatch.setattr(ctypes, "CDLL", None)
        choice = runtime.prepare()
        assert choice == runtime.BlasChoice(None, "switched off by ABFT_MLX_BLAS=none")

    def test_too_late_once_mlx_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "mlx.core", SimpleNamespace())
        monkeypatch.setattr(ctypes, "CDLL", None)
        choice = runtime.prepare()
        assert choice.path is None
        assert "before abft_mlx" in choice.note

    def test_does_nothing_on_a_mac(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(ctypes, "CDLL", None)
        monkeypatch.setattr(runtime, "_candidates", None)
        assert runtime.prepare() == runtime.BlasChoice(None, "MLX brings its own")


class OpenBlas:
    """Stands for ctypes.CDLL: an OpenBLAS that reads the variable whenever it is loaded anew."""

    def __init__(self, picks: str) -> None:
        self.picks, self.modes, self.closed = picks, [], 0

    def __call__(self, path: str | None, mode: int) -> SimpleNamespace:
        if path is None:
            return SimpleNamespace(dlclose=self.close)
        self.modes.append((mode, os.environ.get(runtime.KERNEL_VARIABLE, self.picks)))
        corename = partial(str.encode, self.picks)
        return SimpleNamespace(cblas_sgemm=None, openblas_get_corename=corename, _handle=1)

    def close(self, _: object) -> None:
        self.closed += 1


@pytest.mark.usefixtures("fresh")
class TestKernels:
    """An OpenBLAS that is older than the processor picks kernels from before AVX."""

    def prepared(
        self, monkeypatch: pytest.MonkeyPatch, picks: str, flags: str
    ) -> tuple[OpenBlas, runtime.BlasChoice]:
        library = OpenBlas(picks)
        use(monkeypatch, library, ["openblas"])  # type: ignore[arg-type]
        monkeypatch.setattr(runtime, "_cpu_flags", lambda: set(flags.split()))
        return library, runtime.prepare()

    @pytest.mark.parametrize(
        ("flags", "kernel"),
        [
            ("avx2 fma avx512f avx512bw avx512dq avx512vl", "SkylakeX"),
            ("avx2 fma avx512f", "Haswell"),
        ],
    )
    def test_a_fallback_is_replaced(
        self, monkeypatch: pytest.MonkeyPatch, flags: str, kernel: str
    ) -> None:
        library, choice = self.prepared(monkeypatch, "Prescott", flags)
        assert library.modes == [
            (ctypes.RTLD_LOCAL, "Prescott"),
            (ctypes.RTLD_GLOBAL, kernel),
        ]
        assert library.closed == 1
        assert f"its {kernel} kernels" in choice.note
        assert runtime.KERNEL_VARIABLE not in os.environ


def test_facts_of_the_machine() -> None:
    facts = runtime.memory_facts()
    assert facts["machine_bytes"] > 2**30
    assert facts["recommended_bytes"] is None or facts["recommended_bytes"] < 2**50
    assert 2**23 < runtime.process_peak_bytes() < facts["machine_bytes"]
    assert {"abft-mlx", "python", "mlx", "mlx-lm"} <= set(runtime.versions())
    assert any(word in runtime.device_description() for word in ("CPU", "GPU"))
    assert runtime.matrix_product_flops(64, repeats=1) > 0


def test_a_mac_wires_its_memory_and_bounds_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metal is not here, so its calls are noted down."""
    import mlx.core as mx

    asked: dict[str, int] = {}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 4000})
    monkeypatch.setattr(mx, "set_cache_limit", lambda limit: asked.update(cache=limit) or 0)
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: asked.update(wired=limit) or 7)
    assert runtime.use_wired_memory() == 7
    assert asked == {"wired": 4000, "cache": 1000}
