"""`spark-me engine install`: the engine of this environment, from the cache or from a fresh build."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from spark_me.engine import ENGINE_NAME, ENGINE_VERSION
from spark_me.engine.build import build_wheel, installed_record, record_of
from spark_me.engine.source import cache_dir, cached_wheel, get_archive, locked
from spark_me.engine.toolchain import find_blas, find_cuda, install_packages, last_line, package_home, prepare_blas
from spark_me.errors import EngineError


def install(
    device: str | None = None, source: Path | None = None, rebuild: bool = False, build_only: bool = False
) -> None:
    """Install the engine for the torch, the Python and the device of this environment.

    Args:
        device: "cpu" or "cuda" to force one; None takes CUDA where torch sees a GPU and nvcc is there.
        source: MinkowskiEngine's source archive on disk, instead of a download.
        rebuild: build again even if a cached wheel fits.
        build_only: build the wheel into the cache and load it from there, but leave the environment as it is.

    Raises:
        EngineError: one line that says what failed and what to do.
    """
    try:
        _install(device, source, rebuild, build_only)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise EngineError(
            f"the engine cannot be installed: {error.strerror or error}{where}; "
            f"the cache is {cache_dir()}, SPARK_ME_CACHE moves it"
        ) from error


def _install(device: str | None, source: Path | None, rebuild: bool, build_only: bool) -> None:
    cuda, blas = find_cuda(device), find_blas()
    record = record_of(cuda, blas)
    what = f"{ENGINE_NAME} {ENGINE_VERSION} ({record.device}, torch {record.torch}, {record.blas})"
    if not (rebuild or build_only) and installed_record() == record and import_problem() is None:
        print(f"{what} is already installed")
        return
    with locked(record.key):
        blas = prepare_blas(blas)
        wheel = None if rebuild else cached_wheel(record.key)
        if wheel:
            print(f"using the wheel built before: {wheel}", flush=True)
        else:
            wheel = build_wheel(get_archive(source), cuda, blas, record)
    if not build_only:
        install_packages(str(wheel), reinstall=True)
    done, remedy = ("built", "") if build_only else ("installed", "; try `spark-me engine install --rebuild`")
    if problem := import_problem(wheel if build_only else None):
        raise EngineError(f"{what} is {done} but does not import: {problem}{remedy}")
    print(f"{what} is {done}" + (f" and loads: {wheel}" if build_only else ""))


def import_problem(wheel: Path | None = None) -> str | None:
    """Why the engine does not import, None if it does. Asked of a fresh process, as a user would.

    Args:
        wheel: a wheel to try without installing it, instead of the installed engine.
    """
    with tempfile.TemporaryDirectory() as directory:
        environment = dict(os.environ)
        if wheel:
            environment["PYTHONPATH"] = directory
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(directory)
            if home := package_home():
                # Where an installed engine finds the BLAS that a package carries: beside it.
                Path(directory, home.name).symlink_to(home)
        command = [sys.executable, "-c", f"import {ENGINE_NAME}"]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode == 0:
        return None
    return last_line(result.stderr or f"exit status {result.returncode}")
