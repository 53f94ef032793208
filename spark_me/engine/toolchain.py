"""The programs that a build needs, and how many of them may run at once."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from spark_me.engine.packages import scripts_path
from spark_me.errors import EngineError

# What a translation unit with torch's headers takes at its peak, of g++ and of nvcc's own compiler.
BYTES_PER_JOB = {"cpu": 2.5 * 2**30, "cuda": 4.0 * 2**30}


def find_compiler() -> str | None:
    """The C++ compiler that torch's build step will call: $CXX, else c++."""
    return shutil.which(os.environ.get("CXX") or "c++")


def require_compiler() -> str:
    """The C++ compiler.

    Raises:
        EngineError: if there is none, with the command that installs one.
    """
    if compiler := find_compiler():
        return compiler
    wanted = os.environ.get("CXX") or "c++"
    raise EngineError(f"no C++ compiler ({wanted}): install one with `sudo apt-get install g++`, then run again")


def require_build_packages() -> None:
    """Check that setuptools, wheel and ninja are there.

    Raises:
        EngineError: if not, with the command that installs them.
    """
    missing = [name for name in ("setuptools", "wheel") if importlib.util.find_spec(name) is None]
    if shutil.which("ninja", path=scripts_path()) is None:
        missing.append("ninja")
    if missing:
        raise EngineError(
            f"{', '.join(missing)} missing: install with `pip install {' '.join(missing)}`, then run again"
        )


def compiler_version(compiler: str) -> str:
    """First line of what the compiler says about itself."""
    result = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    return (result.stdout.splitlines() or ["version unknown"])[0]


def parallel_jobs(device: str) -> int:
    """How many files to compile at once: $MAX_JOBS, else every usable core, within the memory that is free.

    Args:
        device: "cpu" or "cuda", what the build is for.
    """
    if wanted := os.environ.get("MAX_JOBS"):
        if not wanted.isdigit() or int(wanted) < 1:
            raise EngineError(f"MAX_JOBS={wanted} is no positive number: unset it or set it to 1 or more")
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = available_memory()
    return cores if memory is None else max(1, min(cores, int(memory // BYTES_PER_JOB[device])))


def available_memory() -> int | None:
    """Bytes of memory that can be taken without swapping, None where Linux's /proc does not tell."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
