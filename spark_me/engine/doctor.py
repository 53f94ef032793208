"""`spark-me doctor` and `spark-me engine info`: what is installed, and a proof that it computes correctly."""

import os
import platform

import torch

from spark_me.engine import ENGINE_NAME, installed_version
from spark_me.engine.build import BuildRecord, installed_record, record_of
from spark_me.engine.source import ARCHIVE_NAME, cache_dir, is_as_built
from spark_me.engine.toolchain import (
    compiler_version,
    fetched_headers,
    find_blas,
    find_cuda,
    find_cuda_home,
    has_python_headers,
    nvcc_version,
    parallel_jobs,
)
from spark_me.errors import EngineError, printable

Facts = list[tuple[str, str]]


def print_info() -> None:
    """Print what is installed, what is cached and what a build would use."""
    for title, facts in (("installed", _installed()), ("cached", _cached()), ("a build would use", _planned())):
        print(f"{title}:")
        for name, value in facts:
            print(f"  {name:<12} {printable(value)}")


def _installed() -> Facts:
    if record := installed_record():
        return _described(record)
    if version := installed_version(ENGINE_NAME):
        return [("engine", f"{ENGINE_NAME} {version}, not built by spark_me")]
    return [("engine", "none; run: spark-me engine install")]


def _described(record: BuildRecord) -> Facts:
    return [
        ("engine", f"{ENGINE_NAME} {record.engine}, key {record.key}"),
        ("device", f"{record.device} {record.cuda}".strip()),
        ("torch", record.torch),
        ("Python", f"{record.abi} on {record.platform}"),
        ("BLAS", record.blas),
    ]


def _cached() -> Facts:
    facts = [("cache", str(cache_dir()))]
    if (cache_dir() / "source" / ARCHIVE_NAME).is_file():
        facts.append(("source", ARCHIVE_NAME))
    for wheel in sorted((cache_dir() / "wheels").glob("*/*.whl")):
        state = "" if is_as_built(wheel) else ", not as it was built or without a digest: would be built again"
        facts.append(("wheel", f"{wheel.parent.name}  {wheel.name}  {wheel.stat().st_size / 1e6:.0f} MB{state}"))
    return facts


def _planned() -> Facts:
    try:
        record = record_of(find_cuda(), find_blas())
    except EngineError as error:
        return [("nothing", str(error))]
    headers = str(fetched_headers()) if fetched_headers().is_dir() else "none yet: fetched from the distribution"
    return [
        *_described(record),
        ("compiler", compiler_version()),
        ("headers", "this Python's own" if has_python_headers() else headers),
        ("jobs", str(parallel_jobs(record.device))),
    ]


def run_doctor() -> int:
    """Print versions, compare the engine's layers with dense torch, say how it went.

    Returns:
        0 if every layer agrees, 1 if one does not.

    Raises:
        EngineError: if the engine is missing or does not load.
    """
    record = installed_record()
    for name, value in _versions(record):
        print(f"{name:<16} {value}")
    # Imports the engine, and raises EngineError where that fails: not before the versions are out.
    from spark_me.engine.checks import cases_for, run_checks, variants_for

    devices = ["cpu", "cuda"] if record and record.device == "cuda" and torch.cuda.is_available() else ["cpu"]
    results = []
    for device in devices:
        for result in run_checks(device, variants_for(device), cases_for(device)):
            print(result.verdict, flush=True)
            results.append(result)
    if varying := [result.name for result in results if not result.repeatable]:
        print(f"two runs differ in their last bits, which is allowed: {', '.join(varying)}")
    if wrong := sum(not result.ok for result in results):
        print(f"{wrong} check(s) failed, the engine is not to be used so: run `spark-me engine install --rebuild`")
        return 1
    print(f"the engine agrees with dense torch, forward and backward, on {' and '.join(devices)}")
    return 0


def _versions(record: BuildRecord | None) -> Facts:
    """(name, version) of everything that decides what the engine computes. Imports no engine."""
    built = f" for {record.device} {record.cuda}".rstrip() + f", build {record.key}" if record else ", not by spark_me"
    engine = installed_version(ENGINE_NAME)
    home = find_cuda_home()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    nvcc = f"nvcc {'.'.join(map(str, nvcc_version(home)))}" if home else "no nvcc"
    return [
        ("spark_me", installed_version("spark_me") or "not installed as a package"),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("torchvision", installed_version("torchvision") or "missing"),
        (ENGINE_NAME, f"{engine}{built}" if engine else "missing"),
        ("BLAS", record.blas if record else "unknown"),
        ("compiler", compiler_version()),
        ("threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')})"),
        ("CUDA", f"torch built for {torch.version.cuda or 'CPU only'}, {gpu}, {nvcc}"),
    ]
