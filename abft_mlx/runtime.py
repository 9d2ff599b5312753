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
CACHE_SHARE = 0.25
CPU_BATCH_TOKENS = 4096


@dataclass
class BlasChoice:
    """Which BLAS serves MLX on the CPU.

    Attributes:
        path: the shared library that was loaded, or None.
        note: why there is none, or where the choice came from.
    """

    path: str | None
    note: str


_choice: BlasChoice | None = None


def _candidates() -> Iterator[tuple[str, str]]:
    asked = os.environ.get(BLAS_VARIABLE)
    if asked is not None:
        if asked and asked != "none":
            yield asked, f"named by {BLAS_VARIABLE}"
        return
    roots = [
        Path("/usr/lib"),
        Path("/usr/lib64"),
        Path("/usr/local/lib"),
        Path("/opt/OpenBLAS/lib"),
    ]
    patterns = (
        "*/openblas-pthread/libopenblas.so.0",
        "*/openblas-openmp/libopenblas.so.0",
        "*/libopenblas.so.0",
        "libopenblas.so.0",
        "libopenblas.so",
    )
    for root in roots:
        for pattern in patterns:
            for found in sorted(root.glob(pattern)):
                yield str(found), "found on this system"
    named = ctypes.util.find_library("openblas")
    if named:
        yield named, "found on this system"
    environment = Path(sys.prefix, "lib")
    for found in sorted(environment.glob("libopenblas.so*")):
        yield str(found), "found in this environment"
    for found in sorted(environment.glob("libmkl_rt.so*")):
        yield str(found), "the mkl package of this environment"


def _cpu_flags() -> set[str]:
    """The x86 instruction sets that Linux names; none on another processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((one for one in lines if one.startswith("flags")), "").split())


def _better_kernel(path: str) -> str | None:
    """The OpenBLAS kernel to ask for, where the library itself would pick one for old processors.

    Args:
        path: a library that is not loaded yet; it is loaded, asked, and let go again.
    """
    flags = _cpu_flags()
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        wanted = "SkylakeX"
    elif {"avx2", "fma"} <= flags:
        wanted = "Haswell"
    else:
        return None
    if os.environ.get(KERNEL_VARIABLE):
        return None
    library = ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL)
    if not hasattr(library, "openblas_get_corename"):
        return None
    library.openblas_get_corename.restype = ctypes.c_char_p
    picked = library.openblas_get_corename().decode()
    ctypes.CDLL(None, mode=ctypes.RTLD_LOCAL).dlclose(ctypes.c_void_p(library._handle))
    return wanted if picked in FALLBACK_KERNELS else None


def _load(path: str) -> tuple[ctypes.CDLL, str | None]:
    """A library whose symbols all later ones see, and the kernel that was asked of it, if any."""
    kernel = _better_kernel(path)
    if kernel is None:
        return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL), None
    os.environ[KERNEL_VARIABLE] = kernel
    try:
        return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL), kernel
    finally:
        del os.environ[KERNEL_VARIABLE]


def prepare() -> BlasChoice:
    """Load an optimised BLAS on Linux, once, before MLX is imported; do nothing on a Mac.

    The environment variable ``ABFT_MLX_BLAS`` names a library to use, or ``none``.

    Returns:
        What was loaded, or why nothing was.
    """
    global _choice
    if _choice is not None:
        return _choice
    if sys.platform != "linux":
        _choice = BlasChoice(None, "MLX brings its own")
        return _choice
    if "mlx.core" in sys.modules:
        _choice = BlasChoice(None, "mlx was imported before abft_mlx")
        return _choice
    failures: list[str] = []
    for path, origin in _candidates():
        try:
            library, kernel = _load(path)
        except OSError as error:
            failures.append(f"{path}: {error}")
            continue
        if not hasattr(library, "cblas_sgemm"):
            failures.append(f"{path}: has no cblas_sgemm")
            continue
        note = f"; with its {kernel} kernels: it does not know this processor" if kernel else ""
        _choice = BlasChoice(path, origin + note)
        return _choice
    asked = os.environ.get(BLAS_VARIABLE)
    if failures:
        note = "; ".join(failures)
    elif asked is not None:
        note = f"switched off by {BLAS_VARIABLE}={asked}"
    else:
        note = "no optimised BLAS found"
    _choice = BlasChoice(None, note)
    return _choice


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
    not fill the unified memory.

    Returns:
        The previous limit in bytes, or None where there is no Metal device.
    """
    import mlx.core as mx

    if not mx.metal.is_available():
        return None
    recommended = int(mx.device_info()["max_recommended_working_set_size"])
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

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


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
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(one in text for one in _OUT_OF_MEMORY)


def release_memory() -> None:
    """Give back what nobody holds any more: arrays in circles of references, and MLX's cache."""
    import gc

    import mlx.core as mx

    gc.collect()
    mx.clear_cache()


def batch_tokens(asked: int) -> int:
    """Tokens in a forward pass: on a CPU no more than CPU_BATCH_TOKENS.

    A larger batch is no faster there, and Ctrl-C has to wait for its end.

    Args:
        asked: what the recipe allows.
    """
    import mlx.core as mx

    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    return asked if on_gpu else min(asked, CPU_BATCH_TOKENS)


def memory_room_bytes() -> int:
    """Bytes that MLX may still take: what the device, the system and the process's limits leave."""
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.gpu):
        info = mx.device_info()
        if "free_memory" in info:
            return int(info["free_memory"])
        whole = int(info.get("max_recommended_working_set_size", machine_memory_bytes()))
        return max(0, whole - int(mx.get_active_memory()))
    if sys.platform != "linux":
        return max(0, machine_memory_bytes() - int(mx.get_active_memory()))
    import resource

    meminfo = Path("/proc/meminfo").read_text()
    rooms = [1024 * int(meminfo.partition("MemAvailable:")[2].split()[0])]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        status = Path("/proc/self/status").read_text()
        rooms.append(limit - 1024 * int(status.partition("VmSize:")[2].split()[0]))
    rooms += _control_group_rooms()
    return max(0, min(rooms))


def _control_group_rooms() -> list[int]:
    """What a container's limit leaves, where there is one."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        root = Path("/sys/fs/cgroup")
        try:
            most, taken = (root / limit).read_text().strip(), (root / used).read_text()
        except OSError:
            continue
        return [int(most) - int(taken)] if most.isdigit() else []
    return []


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
    """Best measured rate of a square matrix product in floating-point operations per second.

    Args:
        size: rows and columns of each factor.
        repeats: timed products after one warm-up; the best counts.
        dtype: an MLX floating-point type's name.
    """
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
