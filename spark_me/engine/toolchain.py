"""What a build needs beside torch: programs, packages, Python's headers, a BLAS; found, or fetched without root."""

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from spark_me.engine.source import cache_dir, make_dir
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
    command = _install_command(reinstall) + list(requirements)
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        said = [line.strip() for line in result.stdout.splitlines() if line.strip()]
        wanted = ", ".join(Path(name).name for name in requirements)
        raise EngineError(f"{wanted} cannot be installed into {sys.prefix}: {said[-1] if said else 'no message'}")


def _install_command(reinstall: bool) -> list[str]:
    if uv := shutil.which("uv", path=scripts_path()):
        command = [uv, "pip", "install", "--quiet", "--python", sys.executable, "--no-deps"]
        return [*command, "--reinstall"] if reinstall else command
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    return [*command, "--force-reinstall"] if reinstall else command


def header_dirs() -> tuple[Path, ...]:
    """Folders to add to a build's include path: none where this Python has its Python.h.

    On Debian and its relatives the matching package is downloaded once into the per-user cache and unpacked there.

    Raises:
        EngineError: where that is not possible, with the command that installs the headers.
    """
    if has_python_headers():
        return ()
    include = fetched_headers()
    if not (include / _python_name() / "Python.h").is_file():
        _fetch_headers()
    # The package's Python.h includes <x86_64-linux-gnu/python3.X/pyconfig.h> from the parent folder.
    return (include / _python_name(), include)


def has_python_headers() -> bool:
    """Whether this Python's include folder holds Python.h."""
    return Path(sysconfig.get_path("include"), "Python.h").is_file()


def fetched_headers() -> Path:
    """The cache's include folder for this Python; it exists only once headers were fetched."""
    return cache_dir() / "headers" / f"{_headers_package()}-{platform.machine()}" / "usr" / "include"


def _fetch_headers() -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise _no_headers("they cannot be fetched here")
    print(f"fetching {_headers_package()}: this Python has no headers", flush=True)
    with tempfile.TemporaryDirectory(dir=make_dir("headers")) as name:
        directory = Path(name)
        package = _download_headers(directory)
        unpacked = directory / "unpacked"
        subprocess.run(["dpkg", "-x", package, unpacked], capture_output=True)
        if not (unpacked / "usr" / "include" / _python_name() / "Python.h").is_file():
            raise _no_headers(f"{package.name} does not hold them")
        home = fetched_headers().parents[1]
        shutil.rmtree(home, ignore_errors=True)
        os.replace(unpacked, home)


def _download_headers(directory: Path) -> Path:
    """Download the package with apt's lists, or with private ones where those are missing or stale."""
    said = _apt(directory, "download", _headers_package())
    if not list(directory.glob("*.deb")):
        for needed in ("lists/partial", "cache/archives/partial"):
            (directory / needed).mkdir(parents=True)
        private = [f"-oDir::State::lists={directory / 'lists'}", f"-oDir::Cache={directory / 'cache'}"]
        _apt(directory, *private, "update")
        said = _apt(directory, *private, "download", _headers_package())
    packages = sorted(directory.glob("*.deb"))
    if not packages:
        raise _no_headers(f"apt-get cannot download {_headers_package()} ({said})")
    return packages[0]


def _apt(directory: Path, *arguments: str) -> str:
    """Run apt-get without a terminal and return its last word."""
    command = ["apt-get", "-qq", "-oDebug::NoLocking=true", *arguments]
    result = subprocess.run(
        command, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return (result.stderr.strip().splitlines() or ["no message"])[-1]


def _no_headers(why: str) -> EngineError:
    return EngineError(
        f"the headers of Python {sys.version_info.major}.{sys.version_info.minor} (Python.h) are missing and {why}: "
        f"install them with `sudo apt-get install {_python_name()}-dev`, then run again"
    )


def _python_name() -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def _headers_package() -> str:
    return f"lib{_python_name()}-dev"


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
    """A BLAS library and how to compile and link with it.

    Attributes:
        name: "openblas" for the system's, or the PyPI package's name.
        version: its version.
        compile_flags: for the C++ compiler.
        link_flags: for the linker.
    """

    name: str
    version: str
    compile_flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()

    @property
    def requirement(self) -> str | None:
        """The package that the built engine needs beside it at run time, if any."""
        return f"{self.name}=={self.version}" if self.name == PYPI_PACKAGE else None


def find_blas(compiler: str | None) -> Blas:
    """The BLAS that a build would use. Installs nothing; without a compiler the system cannot be asked."""
    if compiler is not None and (system := _system_openblas(compiler)):
        return system
    return Blas(PYPI_PACKAGE, PYPI_VERSION)


def prepare_blas(blas: Blas) -> Blas:
    """Make the BLAS usable here, by a build and by the built engine: install the PyPI package if that is the choice.

    Returns:
        The same BLAS, with its flags.

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


def _system_openblas(compiler: str) -> Blas | None:
    for compile_flags, link_flags in _system_flags():
        version = _links(compiler, compile_flags, link_flags)
        if version is not None:
            return Blas("openblas", version, tuple(compile_flags), tuple(link_flags))
    return None


def _system_flags() -> Iterator[tuple[list[str], list[str]]]:
    """Ways to compile and link with a system's OpenBLAS, most official first."""
    if pkg_config := shutil.which("pkg-config"):
        flags = [
            subprocess.run([pkg_config, kind, "openblas"], capture_output=True, text=True)
            for kind in ("--cflags", "--libs")
        ]
        if all(result.returncode == 0 for result in flags):
            yield shlex.split(flags[0].stdout), shlex.split(flags[1].stdout)
    yield [], ["-lopenblas"]
    for include, library in _BLAS_DIRS:
        if Path(include, "cblas.h").is_file():
            yield [f"-I{include}"], [f"-L{library}", "-lopenblas", f"-Wl,-rpath,{library}"]


def _links(compiler: str, compile_flags: list[str], link_flags: list[str]) -> str | None:
    """OpenBLAS's version if a program compiled so runs and multiplies, else None."""
    with tempfile.TemporaryDirectory() as directory:
        source, program = Path(directory, "probe.cpp"), Path(directory, "probe")
        source.write_text(_BLAS_PROGRAM)
        compile_command = [compiler, *compile_flags, str(source), *link_flags, "-o", str(program)]
        if subprocess.run(compile_command, capture_output=True).returncode:
            return None
        result = subprocess.run([program], capture_output=True, text=True)
    words = result.stdout.split()  # "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH …"
    return words[1] if result.returncode == 0 and len(words) > 1 else None


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
