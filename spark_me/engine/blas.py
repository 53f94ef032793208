"""Which BLAS the CPU kernels call: the system's OpenBLAS, else the one that a PyPI package carries."""

import importlib.util
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from spark_me.engine.packages import install_packages, installed_version
from spark_me.errors import EngineError

PYPI_PACKAGE = "scipy-openblas32"
PYPI_MODULE = "scipy_openblas32"
PYPI_VERSION = "0.3.34.481.3"
# The package prefixes its symbols; these are the ones that the engine calls.
_PREFIXED = ("sgemm", "dgemm", "saxpy", "daxpy")
# Where distributions put OpenBLAS without pkg-config knowing it: (include, library).
_COMMON_DIRS = (
    ("/usr/include/openblas", "/usr/lib64"),
    ("/opt/OpenBLAS/include", "/opt/OpenBLAS/lib"),
    ("/usr/local/include", "/usr/local/lib"),
    ("/opt/homebrew/opt/openblas/include", "/opt/homebrew/opt/openblas/lib"),
)
_PROBE = """
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
        compile_flags=(f"-I{home / 'include'}", *(f"-Dcblas_{name}=scipy_cblas_{name}" for name in _PREFIXED)),
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
        version = _probe(compiler, compile_flags, link_flags)
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
    for include, library in _COMMON_DIRS:
        if Path(include, "cblas.h").is_file():
            yield [f"-I{include}"], [f"-L{library}", "-lopenblas", f"-Wl,-rpath,{library}"]


def _probe(compiler: str, compile_flags: list[str], link_flags: list[str]) -> str | None:
    """OpenBLAS's version if a program compiled so runs and multiplies, else None."""
    with tempfile.TemporaryDirectory() as directory:
        source, program = Path(directory, "probe.cpp"), Path(directory, "probe")
        source.write_text(_PROBE)
        compile_command = [compiler, *compile_flags, str(source), *link_flags, "-o", str(program)]
        if subprocess.run(compile_command, capture_output=True).returncode:
            return None
        result = subprocess.run([program], capture_output=True, text=True)
    words = result.stdout.split()  # "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH …"
    return words[1] if result.returncode == 0 and len(words) > 1 else None
