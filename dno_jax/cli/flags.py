"""What XLA is told before jax starts, where nobody has: to hide communication, and how much of a GPU to take."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from dno_jax.parallel.chips import GPU_FRACTION

# By the variable, the packages that read it, with the versions of each that are known to know the options. XLA ends a
# process that is given an option unknown to it, so other versions are given none.
_GPU = {"jax-cuda13-pjrt": ("0.10", "0.12"), "jax-cuda12-pjrt": ("0.10", "0.12")}
_TPU = {"libtpu": ("0.0.42", "0.0.42")}
_OPTIONS: dict[str, tuple[Mapping[str, tuple[str, str]], tuple[str, ...]]] = {
    # Off by default: without it each collective is waited for where it stands.
    "XLA_FLAGS": (_GPU, ("--xla_gpu_enable_latency_hiding_scheduler=true",)),
    # TPUs' own scheduler is on. These let sums over a data axis, between slices too, run beside the backward pass.
    "LIBTPU_INIT_ARGS": (
        _TPU,
        (
            "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
            "--xla_tpu_data_parallel_opt_different_sized_ops=true",
        ),
    ),
}


# Each of them says something of that, so that nothing is added to it.
_MEMORY = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE",
           "XLA_PYTHON_CLIENT_ALLOCATOR")  # fmt: skip


def accelerator_flags(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to set beside an environment's: its own options stay, and come last."""
    found = {}
    for name, (packages, options) in _OPTIONS.items():
        if any(_is_known(package, *versions) for package, versions in packages.items()):
            given = environment.get(name, "")
            missing = [option for option in options if option.split("=")[0].lstrip("-") not in given]
            if missing:
                found[name] = " ".join([*missing, *filter(None, [given])])
    # Of a GPU's memory, what `dno plan` counts with; XLA's own default is three quarters.
    if not any(name in environment for name in _MEMORY):
        found[_MEMORY[0]] = f"{GPU_FRACTION:g}"
    return found


def _is_known(package: str, oldest: str, newest: str) -> bool:
    try:
        own = version(package)
    except PackageNotFoundError:
        return False

    def numbers(text: str, count: int) -> list[int]:
        return [int(part) for part in text.split(".")[:count] if part.isdecimal()]

    count = len(oldest.split("."))
    return numbers(oldest, count) <= numbers(own, count) <= numbers(newest, count)
