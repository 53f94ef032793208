"""Installing Python packages into this environment, with uv where it is there, else with pip."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

from spark_me.errors import EngineError


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def scripts_path() -> str:
    """PATH with this environment's own programs first: the environment need not be activated."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))


def install_packages(*requirements: str, reinstall: bool = False) -> None:
    """Install requirements or wheel files, without their dependencies.

    Raises:
        EngineError: with the installer's own last words.
    """
    command = _command(reinstall) + list(requirements)
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        said = [line.strip() for line in result.stdout.splitlines() if line.strip()]
        wanted = ", ".join(Path(name).name for name in requirements)
        raise EngineError(f"{wanted} cannot be installed into {sys.prefix}: {said[-1] if said else 'no message'}")


def _command(reinstall: bool) -> list[str]:
    if uv := shutil.which("uv", path=scripts_path()):
        command = [uv, "pip", "install", "--quiet", "--python", sys.executable, "--no-deps"]
        return [*command, "--reinstall"] if reinstall else command
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    return [*command, "--force-reinstall"] if reinstall else command
