"""`spark-me engine install`: the engine of this environment, from the cache or from a fresh build."""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from spark_me.engine import ENGINE_NAME, ENGINE_VERSION
from spark_me.engine.build import BuildRecord, build_wheel, installed_record, record_of
from spark_me.engine.source import cache_dir, cached_wheel, get_archive, locked
from spark_me.engine.target import Target, find_target
from spark_me.engine.toolchain import (
    Blas,
    find_blas,
    find_compiler,
    install_packages,
    package_home,
    prepare_blas,
)
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
        (_build if build_only else _install)(device, source, rebuild)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise EngineError(
            f"the engine cannot be installed: {error.strerror or error}{where}; "
            f"the cache is {cache_dir()}, SPARK_ME_CACHE moves it"
        ) from error


def import_problem(wheel: Path | None = None) -> str | None:
    """Why the engine does not import, None if it does. Asked of a fresh process, as a user would.

    Args:
        wheel: a wheel to try without installing it, instead of the installed engine.
    """
    if wheel is None:
        return _import_problem(dict(os.environ))
    with tempfile.TemporaryDirectory() as directory:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory)
        if home := package_home():
            # Where an installed engine finds the BLAS that a package carries: beside it.
            Path(directory, home.name).symlink_to(home)
        return _import_problem({**os.environ, "PYTHONPATH": directory})


def _import_problem(environment: Mapping[str, str]) -> str | None:
    command = [sys.executable, "-c", f"import {ENGINE_NAME}"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode == 0:
        return None
    return (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]


def _install(device: str | None, source: Path | None, rebuild: bool) -> None:
    plan = _plan(device)
    if not rebuild and installed_record() == plan.record and import_problem() is None:
        print(f"{plan.what} is already installed")
        return
    wheel = _wheel(plan, source, rebuild)
    prepare_blas(plan.blas)
    install_packages(str(wheel), reinstall=True)
    if problem := import_problem():
        raise EngineError(
            f"{plan.what} is installed but does not import: {problem}; try `spark-me engine install --rebuild`"
        )
    print(f"{plan.what} is installed")


def _build(device: str | None, source: Path | None, rebuild: bool) -> None:
    plan = _plan(device)
    wheel = _wheel(plan, source, rebuild)
    prepare_blas(plan.blas)
    if problem := import_problem(wheel):
        raise EngineError(f"{plan.what} is built but does not import: {problem}")
    print(f"{plan.what} is built and loads: {wheel}")


@dataclass(frozen=True)
class _Plan:
    """What this environment needs."""

    target: Target
    blas: Blas
    record: BuildRecord

    @property
    def what(self) -> str:
        """The engine, for people."""
        record = self.record
        return f"{ENGINE_NAME} {ENGINE_VERSION} ({record.device}, torch {record.torch}, {record.blas})"


def _plan(device: str | None) -> _Plan:
    target = find_target(device)
    blas = find_blas(find_compiler())
    return _Plan(target, blas, record_of(target, blas))


def _wheel(plan: _Plan, source: Path | None, rebuild: bool) -> Path:
    with locked(plan.record.key):
        cached = cached_wheel(plan.record.key)
        if cached is not None and not rebuild:
            print(f"using the wheel built before: {cached}", flush=True)
            return cached
        return build_wheel(get_archive(source), plan.target, plan.blas, plan.record)
