"""`spark-me doctor` and `spark-me engine info`: what is installed, and a proof that it computes correctly."""

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from spark_me.engine import ENGINE_NAME, ENGINE_VERSION
from spark_me.engine.build import installed_record, record_of
from spark_me.engine.source import ARCHIVE_NAME, cache_dir, is_as_built
from spark_me.engine.target import find_cuda_home, find_target, nvcc_version
from spark_me.engine.toolchain import (
    compiler_version,
    fetched_headers,
    find_blas,
    find_compiler,
    has_python_headers,
    installed_version,
    parallel_jobs,
)
from spark_me.errors import EngineError, printable


def print_info() -> None:
    """Print what is installed, what is cached and what a build would use."""
    for title, facts in (("installed", _installed()), ("cached", _cached()), ("a build would use", _planned())):
        print(f"{title}:")
        for name, value in facts:
            print(f"  {name:<12} {printable(value)}")


def _installed() -> list[tuple[str, str]]:
    version = installed_version(ENGINE_NAME)
    if version is None:
        return [("engine", "none; run: spark-me engine install")]
    record = installed_record()
    if record is None:
        return [("engine", f"{ENGINE_NAME} {version}, not built by spark_me")]
    return [
        ("engine", f"{ENGINE_NAME} {version}"),
        ("device", f"{record.device} {record.cuda}".strip()),
        ("for", f"torch {record.torch}, {record.abi}"),
        ("BLAS", record.blas),
        ("build key", record.key),
    ]


def _cached() -> list[tuple[str, str]]:
    facts = [("cache", str(cache_dir()))]
    if (cache_dir() / "source" / ARCHIVE_NAME).is_file():
        facts.append(("source", ARCHIVE_NAME))
    return facts + [("wheel", _describe_wheel(wheel)) for wheel in sorted((cache_dir() / "wheels").glob("*/*.whl"))]


def _describe_wheel(wheel: Path) -> str:
    state = "" if is_as_built(wheel) else ", not as it was built or without a digest: would be built again"
    return f"{wheel.parent.name}  {wheel.name}  {wheel.stat().st_size / 1e6:.0f} MB{state}"


def _planned() -> list[tuple[str, str]]:
    compiler = find_compiler()
    try:
        record = record_of(find_target(), find_blas(compiler))
    except EngineError as error:
        return [("nothing", str(error))]
    return [
        ("engine", f"{ENGINE_NAME} {ENGINE_VERSION}, key {record.key}"),
        ("device", f"{record.device} {record.cuda}".strip()),
        ("torch", record.torch),
        ("Python", f"{record.abi} on {record.platform}"),
        ("compiler", compiler_version(compiler) if compiler else "none: sudo apt-get install g++"),
        ("BLAS", record.blas),
        ("headers", _headers()),
        ("jobs", str(parallel_jobs(record.device))),
    ]


def _headers() -> str:
    if has_python_headers():
        return "this Python's own"
    return str(fetched_headers()) if fetched_headers().is_dir() else "none yet: fetched from the distribution"


if TYPE_CHECKING:
    from spark_me.engine import checks


def run_doctor() -> int:
    """Print versions, compare the engine's layers with dense torch, say how it went.

    Returns:
        0 if every layer agrees, 1 if one does not.

    Raises:
        EngineError: if the engine is missing or does not load.
    """
    for name, value in versions():
        print(f"{name:<16} {value}")
    # Imports the engine, and raises EngineError where that fails: not before the versions are out.
    from spark_me.engine.checks import cases_for, run_checks, variants_for

    results: list[checks.Result] = []
    for device in _devices():
        for result in run_checks(device, variants_for(device), cases_for(device)):
            print(_describe(result), flush=True)
            results.append(result)
    if varying := [result.name for result in results if not result.repeatable]:
        print(f"two runs differ in their last bits, which is allowed: {', '.join(varying)}")
    if wrong := sum(not result.ok for result in results):
        print(f"{wrong} check(s) failed, the engine is not to be used so: run `spark-me engine install --rebuild`")
        return 1
    print(f"the engine agrees with dense torch, forward and backward, on {' and '.join(_devices())}")
    return 0


def versions() -> list[tuple[str, str]]:
    """(name, version) of everything that decides what the engine computes. Imports no engine."""
    compiler = find_compiler()
    record = installed_record()
    return [
        ("spark_me", installed_version("spark_me") or "not installed as a package"),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("torchvision", installed_version("torchvision") or "missing"),
        (ENGINE_NAME, _engine()),
        ("BLAS", record.blas if record else "unknown"),
        ("compiler", compiler_version(compiler) if compiler else "none"),
        ("threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')})"),
        ("CUDA", _cuda()),
    ]


def _describe(result: "checks.Result") -> str:
    if result.problem:
        return f"FAILED {result.name}: {result.problem}, at {result.case}"
    if not result.ok:
        return f"MISMATCH {result.name}: max error {result.error:.1e}, at {result.case}"
    return f"ok {result.name}: max error {result.error:.1e}"


def _devices() -> list[str]:
    record = installed_record()
    on_gpu = record is not None and record.device == "cuda" and torch.cuda.is_available()
    return ["cpu", "cuda"] if on_gpu else ["cpu"]


def _engine() -> str:
    version = installed_version(ENGINE_NAME)
    if version is None:
        return "missing"
    record = installed_record()
    if record is None:
        return f"{version}, not built by spark_me"
    return f"{version} for {record.device}, build {record.key}" + (f", CUDA {record.cuda}" if record.cuda else "")


def _cuda() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    home = find_cuda_home()
    nvcc = f"nvcc {'.'.join(map(str, nvcc_version(home)))}" if home else "no nvcc"
    return f"torch built for {torch.version.cuda or 'CPU only'}, {gpu}, {nvcc}"
