"""What a build needs beside torch: programs, Python's headers, a BLAS, CUDA; found, or fetched without root."""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from spark_me.engine import installed_version
from spark_me.engine.source import cache_dir, make_dir
from spark_me.errors import EngineError

BYTES_PER_JOB = {"cpu": 2.5 * 2**30, "cuda": 4.0 * 2**30}
"""What a translation unit with torch's headers takes at its peak, of g++ and of nvcc's own compiler."""


def scripts_path() -> str:
    """PATH with this environment's own programs first: the environment need not be activated."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))


def install_packages(*requirements: str, reinstall: bool = False) -> None:
    """Install requirements or wheel files, without their dependencies.

    Raises:
        EngineError: with the installer's own last words.
    """
    uv = shutil.which("uv", path=scripts_path())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    command = [uv, "pip", "install", "--python", sys.executable] if uv else pip
    command += ["--quiet", "--no-deps", *(["--force-reinstall"] if reinstall else []), *requirements]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        wanted = ", ".join(Path(name).name for name in requirements)
        raise EngineError(f"{wanted} cannot be installed into {sys.prefix}: {last_line(result.stdout)}")


def last_line(text: str) -> str:
    """The last line in which a program said something."""
    return (text.strip().splitlines() or ["it said nothing"])[-1].strip()


def find_compiler() -> str | None:
    """The C++ compiler that torch's build step will call: $CXX, else c++."""
    return shutil.which(os.environ.get("CXX") or "c++")


def compiler_version() -> str:
    """First line of what the C++ compiler says about itself, for people."""
    if compiler := find_compiler():
        result = subprocess.run([compiler, "--version"], capture_output=True, text=True)
        return (result.stdout.splitlines() or ["version unknown"])[0]
    return "none: sudo apt-get install g++"


def require_build_tools() -> None:
    """Check that a C++ compiler, setuptools, wheel and ninja are there.

    Raises:
        EngineError: if not, with the command that installs them.
    """
    if find_compiler() is None:
        wanted = os.environ.get("CXX") or "c++"
        raise EngineError(f"no C++ compiler ({wanted}): install one with `sudo apt-get install g++`, then run again")
    missing = [name for name in ("setuptools", "wheel") if importlib.util.find_spec(name) is None]
    missing += [] if shutil.which("ninja", path=scripts_path()) else ["ninja"]
    if missing:
        raise EngineError(
            f"{', '.join(missing)} missing: install with `pip install {' '.join(missing)}`, then run again"
        )


def parallel_jobs(device: str) -> int:
    """How many files to compile at once for "cpu" or "cuda": $MAX_JOBS, else usable cores, as free memory allows."""
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
    found = re.search(r"^MemAvailable: *(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.is_file() else None
    return int(found[1]) * 1024 if found else None


PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
HEADERS_PACKAGE = f"lib{PYTHON}-dev"


def header_dirs() -> tuple[Path, ...]:
    """Folders to add to a build's include path: none where this Python has its Python.h.

    On Debian and its relatives the matching package is downloaded once into the per-user cache and unpacked there.

    Raises:
        EngineError: where that is not possible, with the command that installs the headers.
    """
    if has_python_headers():
        return ()
    include = fetched_headers()
    if not (include / PYTHON / "Python.h").is_file():
        _fetch_headers(include.parents[1])
    # The package's Python.h includes <x86_64-linux-gnu/python3.X/pyconfig.h> from the parent folder.
    return (include / PYTHON, include)


def has_python_headers() -> bool:
    """Whether this Python's include folder holds Python.h."""
    return Path(sysconfig.get_path("include"), "Python.h").is_file()


def fetched_headers() -> Path:
    """The cache's include folder for this Python; it exists only once headers were fetched."""
    return cache_dir() / "headers" / f"{HEADERS_PACKAGE}-{platform.machine()}" / "usr" / "include"


def _fetch_headers(home: Path) -> None:
    """Unpack the package at `home`, downloaded with apt's lists, or with private ones if those are missing or stale."""
    said = "there is no apt-get here"
    with tempfile.TemporaryDirectory(dir=make_dir("headers")) as name:
        directory, unpacked = Path(name), Path(name, "unpacked")
        if shutil.which("apt-get") and shutil.which("dpkg"):
            print(f"fetching {HEADERS_PACKAGE}: this Python has no headers", flush=True)
            for needed in ("lists/partial", "cache/archives/partial"):
                (directory / needed).mkdir(parents=True)
            private = [f"-oDir::State::lists={directory / 'lists'}", f"-oDir::Cache={directory / 'cache'}"]
            download = ["download", HEADERS_PACKAGE]
            for arguments in (download, [*private, "update"], [*private, *download]):
                if not list(directory.glob("*.deb")):
                    command = ["apt-get", "-qq", "-oDebug::NoLocking=true", *arguments]
                    result = subprocess.run(
                        command, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True
                    )
                    said = last_line(result.stderr)
            for package in directory.glob("*.deb"):
                subprocess.run(["dpkg", "-x", package, unpacked], capture_output=True)
                said = f"{package.name} does not hold them"
        if not (unpacked / "usr" / "include" / PYTHON / "Python.h").is_file():
            raise EngineError(
                f"the headers of this {PYTHON} (Python.h) are missing and cannot be fetched ({said}): "
                f"install them with `sudo apt-get install {PYTHON}-dev`, then run again"
            )
        shutil.rmtree(home, ignore_errors=True)
        os.replace(unpacked, home)


PYPI_PACKAGE = "scipy-openblas32"
PYPI_MODULE = "scipy_openblas32"
PYPI_VERSION = "0.3.34.481.3"
# The package prefixes its symbols; these are the ones that the engine calls.
_BLAS_FUNCTIONS = ("sgemm", "dgemm", "saxpy", "daxpy")
# Where distributions put OpenBLAS without pkg-config knowing it: (include, library).
_BLAS_DIRS = (
    ("/usr/include/openblas", "/usr/lib64"),
    ("/opt/OpenBLAS/include", "/opt/OpenBLAS/lib"),
    ("/usr/local/include", "/usr/local/lib"),
    ("/opt/homebrew/opt/openblas/include", "/opt/homebrew/opt/openblas/lib"),
)
_BLAS_PROGRAM = """
#include <cstdio>
extern "C" {
#include <cblas.h>
char *openblas_get_config(void);
}
int main() {
  double a = 3, b = 5, c = 0;
  cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, 1, 1, 1, 1.0, &a, 1, &b, 1, 0.0, &c, 1);
  std::printf("%s", openblas_get_config());
  return c == 15 ? 0 : 1;
}
"""


@dataclass(frozen=True)
class Blas:
    """A BLAS library and how to compile and link with it; its name is "openblas" for the system's, or PyPI's."""

    name: str
    version: str
    compile_flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()

    @property
    def requirement(self) -> str | None:
        """The package that the built engine needs beside it at run time, if any."""
        return f"{self.name}=={self.version}" if self.name == PYPI_PACKAGE else None


def find_blas() -> Blas:
    """What a build would use: the system's OpenBLAS if it links and multiplies, else PyPI's, not installed yet."""
    if compiler := find_compiler():
        for compile_flags, link_flags in _system_flags():
            if version := _probe_blas([compiler, *compile_flags], link_flags):
                return Blas("openblas", version, tuple(compile_flags), tuple(link_flags))
    return Blas(PYPI_PACKAGE, PYPI_VERSION)


def _probe_blas(compile_command: list[str], link_flags: list[str]) -> str | None:
    """OpenBLAS's version if a program compiled so runs and multiplies, else None."""
    with tempfile.TemporaryDirectory() as directory:
        source, program = Path(directory, "probe.cpp"), Path(directory, "probe")
        source.write_text(_BLAS_PROGRAM)
        if subprocess.run([*compile_command, source, *link_flags, "-o", program], capture_output=True).returncode:
            return None
        result = subprocess.run([program], capture_output=True, text=True)
    words = result.stdout.split()  # "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH …"
    return words[1] if result.returncode == 0 and len(words) > 1 else None


def _system_flags() -> Iterator[tuple[list[str], list[str]]]:
    """Ways to compile and link with a system's OpenBLAS, most official first."""
    if pkg_config := shutil.which("pkg-config"):
        commands = [[pkg_config, kind, "openblas"] for kind in ("--cflags", "--libs")]
        cflags, libs = (subprocess.run(command, capture_output=True, text=True) for command in commands)
        if cflags.returncode == libs.returncode == 0:
            yield shlex.split(cflags.stdout), shlex.split(libs.stdout)
    yield [], ["-lopenblas"]
    for include, library in _BLAS_DIRS:
        if Path(include, "cblas.h").is_file():
            yield [f"-I{include}"], [f"-L{library}", "-lopenblas", f"-Wl,-rpath,{library}"]


def prepare_blas(blas: Blas) -> Blas:
    """The same BLAS, with its flags and usable by a build and by the built engine: PyPI's is installed.

    Raises:
        EngineError: if the package cannot be installed.
    """
    if blas.requirement is None:
        return blas
    if installed_version(PYPI_PACKAGE) != PYPI_VERSION:
        print(f"installing {blas.requirement}", flush=True)
        install_packages(blas.requirement)
        importlib.invalidate_caches()
    home = package_home()
    if home is None:
        raise EngineError(f"{blas.requirement} is installed but incomplete: reinstall it with pip --force-reinstall")
    return replace(
        blas,
        compile_flags=(f"-I{home / 'include'}", *(f"-Dcblas_{name}=scipy_cblas_{name}" for name in _BLAS_FUNCTIONS)),
        # The engine's library and the package are neighbours in every environment.
        link_flags=(f"-L{home / 'lib'}", "-lscipy_openblas", f"-Wl,-rpath,$ORIGIN/../{PYPI_MODULE}/lib"),
    )


def package_home() -> Path | None:
    """The installed PyPI package's folder, None if it is not installed."""
    # Located, not imported: importing it would load the library into this process.
    spec = importlib.util.find_spec(PYPI_MODULE)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


_DEFAULT_CUDA_HOME = "/usr/local/cuda"


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit, nvcc's (major, minor), and the GPU architectures to compile for, such as "9.0" or "8.0;9.0"."""

    home: Path
    version: tuple[int, int]
    archs: str


def find_cuda(device: str | None = None) -> Cuda | None:
    """What an engine for this torch is to be compiled with for GPUs, None to compile it for the CPU.

    Args:
        device: "cpu" or "cuda" to force one; None takes CUDA where torch sees a GPU and nvcc is there.

    Raises:
        EngineError: if CUDA is asked for, or would be chosen, and cannot be built for.
    """
    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        return None
    wanted = torch.version.cuda
    if wanted is None:
        raise EngineError(
            f"torch {torch.__version__} is built without CUDA, so the engine cannot be either: "
            "install a CUDA build of torch, or use --cpu"
        )
    home = find_cuda_home()
    if home is None:
        remedy = f"install the CUDA toolkit {wanted} (torch's own version) and put nvcc on PATH or set CUDA_HOME"
        if device == "cuda":
            raise EngineError(f"--cuda needs nvcc: {remedy}")
        print(f"torch sees a GPU, but there is no nvcc: building for the CPU. For the GPU, {remedy}, and run again")
        return None
    version = nvcc_version(home)
    if version[0] != int(wanted.split(".")[0]):
        raise EngineError(
            f"nvcc in {home} is {version[0]}.{version[1]}, but torch was built with CUDA {wanted}: "
            f"install the CUDA toolkit {wanted} and set CUDA_HOME to it, or use --cpu"
        )
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not archs:
        found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
        archs = ";".join(f"{major}.{minor}" for major, minor in sorted(found))
    if not archs:
        raise EngineError(
            "--cuda without a GPU in this machine: say which to compile for, for example TORCH_CUDA_ARCH_LIST=9.0"
        )
    return Cuda(home, version, archs)


def find_cuda_home() -> Path | None:
    """The first complete CUDA toolkit of $CUDA_HOME, $CUDA_PATH, nvcc on PATH, /usr/local/cuda."""
    nvcc = shutil.which("nvcc")
    on_path = str(Path(nvcc).parent.parent) if nvcc else None
    for candidate in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), on_path, _DEFAULT_CUDA_HOME):
        # An nvcc on PATH may be a wrapper that lies apart from its toolkit: the headers tell.
        if candidate and all(Path(candidate, part).is_file() for part in ("bin/nvcc", "include/cuda_runtime.h")):
            return Path(candidate)
    return None


def nvcc_version(home: Path) -> tuple[int, int]:
    """(major, minor) that nvcc reports."""
    said, problem = "", "does not tell its version"
    try:
        said = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        problem = f"does not run ({error})"
    match = re.search(r"release (\d+)\.(\d+)", said)
    if match is None:
        raise EngineError(f"{home}/bin/nvcc {problem}: reinstall the CUDA toolkit, or use --cpu")
    return int(match[1]), int(match[2])
