"""Device, dtype and memory: what must be right before MLX does any work.

On Linux, MLX's CPU wheel carries the reference BLAS, about forty times slower than an optimised
one. :func:`prepare` loads an optimised BLAS, with its symbols visible to everything loaded later,
so importing ``abft_mlx`` runs it, before ``mlx.core`` can be imported. A Mac needs none.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLAS_VARIABLE = "ABFT_MLX_BLAS"
# OpenBLAS reads the kernel to use from here, once, as it is loaded.
KERNEL_VARIABLE = "OPENBLAS_CORETYPE"
# What OpenBLAS falls back to on an x86 processor that is younger than itself.
FALLBACK_KERNELS = ("Prescott", "Core2", "Generic")
# Where distributions put OpenBLAS; the threaded builds first.
LIBRARIES = (
    "*/openblas-pthread/libopenblas.so.0", "*/openblas-openmp/libopenblas.so.0",
    "*/libopenblas.so.0", "libopenblas.so.0", "libopenblas.so",
)  # fmt: skip
CACHE_SHARE = 0.25
CPU_BATCH_TOKENS = 4096


@dataclass
class BlasChoice:
    """The BLAS library that serves MLX on the CPU, or None, and where it is from or why not."""

    path: str | None
    note: str


_choice: BlasChoice | None = None


def _candidates() -> Iterator[tuple[str, str]]:
    """Paths of libraries to try, and where each is from."""
    named = os.environ.get(BLAS_VARIABLE)
    if named is not None:
        if named not in ("", "none"):
            yield named, f"named by {BLAS_VARIABLE}"
        return
    for root in map(Path, ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/opt/OpenBLAS/lib")):
        for pattern in LIBRARIES:
            for path in sorted(root.glob(pattern)):
                yield str(path), "found on this system"
    if system := ctypes.util.find_library("openblas"):
        yield system, "found on this system"
    environment = Path(sys.prefix, "lib")
    for path in sorted(environment.glob("libopenblas.so*")):
        yield str(path), "found in this environment"
    for path in sorted(environment.glob("libmkl_rt.so*")):
        yield str(path), "the mkl package of this environment"


def _cpu_flags() -> set[str]:
    """The x86 instruction sets that Linux names; none on another processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _better_kernel(path: str) -> str | None:
    """The OpenBLAS kernel to ask for, where the library picks one for old processors.

    The library is loaded, asked, and unloaded again.
    """
    flags = _cpu_flags()
    if os.environ.get(KERNEL_VARIABLE) or not {"avx2", "fma"} <= flags:
        return None
    library = ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL)
    if not hasattr(library, "openblas_get_corename"):
        return None
    library.openblas_get_corename.restype = ctypes.c_char_p
    kernel = library.openblas_get_corename().decode()
    ctypes.CDLL(None, mode=ctypes.RTLD_LOCAL).dlclose(ctypes.c_void_p(library._handle))
    if kernel not in FALLBACK_KERNELS:
        return None
    return "SkylakeX" if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags else "Haswell"


def prepare() -> BlasChoice:
    """Load an optimised BLAS on Linux, once, before MLX is imported; do nothing on a Mac.

    The environment variable ``ABFT_MLX_BLAS`` names a library to use, or ``none``.
    """
    global _choice
    if _choice is None:
        _choice = _load_blas()
    return _choice


def _load_blas() -> BlasChoice:
    """Load the first candidate that is a BLAS, its symbols visible to all later libraries."""
    if sys.platform != "linux":
        return BlasChoice(None, "MLX brings its own")
    if "mlx.core" in sys.modules:
        return BlasChoice(None, "mlx was imported before abft_mlx")
    failures = []
    for path, note in _candidates():
        try:
            if kernel := _better_kernel(path):
                os.environ[KERNEL_VARIABLE] = kernel
                note += f"; with its {kernel} kernels: it does not know this processor"
            library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            if kernel:
                del os.environ[KERNEL_VARIABLE]
        except OSError as error:
            failures.append(f"{path}: {error}")
            continue
        if hasattr(library, "cblas_sgemm"):
            return BlasChoice(path, note)
        failures.append(f"{path}: has no cblas_sgemm")
    if failures:
        return BlasChoice(None, "; ".join(failures))
    named = os.environ.get(BLAS_VARIABLE)
    if named is not None:
        return BlasChoice(None, f"switched off by {BLAS_VARIABLE}={named}")
    return BlasChoice(None, "no optimised BLAS found")


def slow_blas() -> str | None:
    """One line for a user whose MLX computes with the reference BLAS on a CPU; None elsewhere."""
    choice = prepare()
    if sys.platform != "linux" or choice.path is not None:
        return None
    return (
        f"warning: MLX uses its slow reference BLAS ({choice.note}); on a CPU everything takes up "
        "to 40 times longer. Install OpenBLAS (apt-get install libopenblas0-pthread) and see: "
        "abft-mlx doctor"
    )


def use_wired_memory() -> int | None:
    """Let MLX wire as much memory as the Mac recommends, so weights are not paged out.

    MLX's cache of freed buffers is bounded to a share of that, so that batches of many shapes do
    not fill the unified memory. Returns the previous limit in bytes, None without Metal.
    """
    import mlx.core as mx

    recommended = memory_facts()["recommended_bytes"]
    if recommended is None:
        return None
    mx.set_cache_limit(int(recommended * CACHE_SHARE))
    return int(mx.set_wired_limit(recommended))


def peak_memory_bytes() -> int:
    """Peak bytes that MLX has had allocated since the last reset."""
    import mlx.core as mx

    return int(mx.get_peak_memory())


def reset_peak_memory() -> None:
    """Start measuring MLX's peak memory anew."""
    import mlx.core as mx

    mx.reset_peak_memory()


def reset_process_peak() -> None:
    """Let :func:`process_peak_bytes` start from what the process has now, where Linux allows it."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def process_peak_bytes() -> int:
    """Peak resident memory of this process in bytes, as the operating system counts it."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on a Mac


def machine_memory_bytes() -> int:
    """Physical memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_facts() -> dict[str, int | None]:
    """Bytes of memory in the machine, and how many of them macOS recommends to wire for MLX.

    The second is None where there is no Metal device.
    """
    import mlx.core as mx

    recommended = None
    if mx.metal.is_available():
        recommended = int(mx.device_info()["max_recommended_working_set_size"])
    return {"machine_bytes": machine_memory_bytes(), "recommended_bytes": recommended}


# MLX's allocators, its Metal command buffers and CUDA, each in their own words.
_OUT_OF_MEMORY = ("unable to allocate", "[metal::malloc]", "insufficient memory", "out of memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)
    )


def release_memory() -> None:
    """Free what nobody holds any more: arrays in reference cycles, and MLX's cache."""
    import gc

    import mlx.core as mx

    gc.collect()
    mx.clear_cache()


def batch_tokens(limit: int) -> int:
    """Tokens in a forward pass: on a CPU at most CPU_BATCH_TOKENS.

    A larger batch is no faster there, and Ctrl-C has to wait for its end.
    """
    import mlx.core as mx

    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    return limit if on_gpu else min(limit, CPU_BATCH_TOKENS)


def memory_room_bytes() -> int:
    """Bytes that MLX may still take: what the device, the system and a container leave."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.gpu):
        info = mx.device_info()
        if "free_memory" in info:
            return int(info["free_memory"])
        total = int(info.get("max_recommended_working_set_size", machine_memory_bytes()))
        return max(0, total - int(mx.get_active_memory()))
    if sys.platform != "linux":
        return max(0, machine_memory_bytes() - int(mx.get_active_memory()))
    meminfo = Path("/proc/meminfo").read_text()
    room = 1024 * int(meminfo.partition("MemAvailable:")[2].split()[0])
    try:
        limit, used = (Path("/sys/fs/cgroup", f"memory.{what}").read_text().strip()
                       for what in ("max", "current"))  # fmt: skip
    except OSError:  # no container
        return room
    return max(0, min(room, int(limit) - int(used) if limit.isdigit() else room))


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of what the numbers depend on."""
    from importlib.metadata import version

    from abft_mlx import __version__

    names = ("mlx", "mlx-lm", "numpy", "transformers", "huggingface-hub")
    return {
        "abft-mlx": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def device_description() -> str:
    """The device that MLX computes on, in words."""
    import mlx.core as mx

    kind = "GPU" if mx.default_device() == mx.Device(mx.gpu) else "CPU"
    name = mx.device_info().get("device_name", platform.machine())
    return f"{kind}, {name}, {os.cpu_count()} CPU cores"


def matrix_product_flops(size: int = 1024, repeats: int = 3, dtype: str = "float32") -> float:
    """Best rate of a product of two square matrices, in floating-point operations per second."""
    import mlx.core as mx

    left = mx.random.normal((size, size)).astype(getattr(mx, dtype))
    right = mx.random.normal((size, size)).astype(getattr(mx, dtype))
    mx.eval(left @ right)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(left @ right)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
