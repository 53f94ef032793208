"""`spark-me engine install`: the engine of this environment, from the cache or from a fresh build."""

import subprocess
import sys
from pathlib import Path

from spark_me.engine import ENGINE_NAME, ENGINE_VERSION
from spark_me.engine.blas import Blas, find_blas, prepare_blas
from spark_me.engine.build import build_wheel
from spark_me.engine.cache import cache_dir, cached_wheel, locked
from spark_me.engine.packages import install_packages
from spark_me.engine.record import BuildRecord, installed_record, record_of
from spark_me.engine.source import get_archive
from spark_me.engine.target import Target, find_target
from spark_me.engine.toolchain import find_compiler
from spark_me.errors import EngineError


def install(device: str | None = None, source: Path | None = None, rebuild: bool = False) -> None:
    """Install the engine for the torch, the Python and the device of this environment.

    Args:
        device: "cpu" or "cuda" to force one; None takes CUDA where torch sees a GPU and nvcc is there.
        source: MinkowskiEngine's source archive on disk, instead of a download.
        rebuild: build again even if a cached wheel fits.

    Raises:
        EngineError: one line that says what failed and what to do.
    """
    try:
        _install(device, source, rebuild)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise EngineError(
            f"the engine cannot be installed: {error.strerror or error}{where}; "
            f"the cache is {cache_dir()}, SPARK_ME_CACHE moves it"
        ) from error


def import_problem() -> str | None:
    """Why the installed engine does not import, None if it does. Asked of a fresh process, as a user would."""
    command = [sys.executable, "-c", f"import {ENGINE_NAME}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    return (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]


def _install(device: str | None, source: Path | None, rebuild: bool) -> None:
    target = find_target(device)
    blas = find_blas(find_compiler())
    record = record_of(target, blas)
    what = f"{ENGINE_NAME} {ENGINE_VERSION} ({record.device}, torch {record.torch}, {record.blas})"
    if not rebuild and installed_record() == record and import_problem() is None:
        print(f"{what} is already installed")
        return
    wheel = _wheel(target, blas, record, source, rebuild)
    prepare_blas(blas)
    install_packages(str(wheel), reinstall=True)
    if problem := import_problem():
        raise EngineError(
            f"{what} is installed but does not import: {problem}; try `spark-me engine install --rebuild`"
        )
    print(f"{what} is installed")


def _wheel(target: Target, blas: Blas, record: BuildRecord, source: Path | None, rebuild: bool) -> Path:
    with locked(record.key):
        cached = cached_wheel(record.key)
        if cached is not None and not rebuild:
            print(f"using the wheel built before: {cached}", flush=True)
            return cached
        return build_wheel(get_archive(source), target, blas, record)
