"""Compile Triton kernels for a GPU that is not there: launches compile, on CPU tensors, and compute nothing.

Triton's interpreter takes much that its compiler refuses. Kernels must be imported where `TRITON_INTERPRET` is not set,
so tests do this in a process of their own.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@contextmanager
def compiled_kernels(capability: int = 90) -> Iterator[list[CompiledKernel]]:
    """While this is open, every launch compiles its kernel for an NVIDIA GPU and appends it to the list."""
    kernels: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, **kwargs: object) -> CompiledKernel:
        kernels.append(run(self, *args, **kwargs | {"warmup": True}))
        return kernels[-1]

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = run


def compile_in_new_process(script: str) -> list[str]:
    """Run a script that uses `compiled_kernels` and prints; the words that it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(Path(__file__).parent), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
