"""What a build finds around it: compiler, toolchain of Python, BLAS, CUDA; and what it says when one is missing."""

import subprocess
import sys
import sysconfig

import pytest
import torch

from spark_me.engine import toolchain
from spark_me.errors import EngineError

PYTHON = toolchain.PYTHON


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """The only folder on PATH; call it with a name and a script to put a program there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("SPARK_ME_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)

    def add(name, script):
        program = folder / name
        program.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
        program.chmod(0o755)
        return str(program)

    return add


def test_a_missing_compiler_names_the_apt_command(programs):
    with pytest.raises(EngineError, match=r"sudo apt-get install g\+\+"):
        toolchain.require_build_tools()
    assert toolchain.compiler_version() == "none: sudo apt-get install g++"
    compiler = programs("c++", "echo 'c++ (Test) 1.2.3'; echo more")
    assert toolchain.find_compiler() == compiler
    assert toolchain.compiler_version() == "c++ (Test) 1.2.3"


def test_the_compiler_of_the_environment_wins(programs, monkeypatch):
    programs("c++", "")
    clang = programs("clang++", "")
    monkeypatch.setenv("CXX", "clang++")
    assert toolchain.find_compiler() == clang


def test_versions_are_told_without_the_packages_that_building_needs():
    code = "import sys; sys.modules['requests'] = None; from spark_me.cli import main; main(['--version'])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.returncode == 0 and "MinkowskiEngine 0.5.4" in said.stdout, said.stderr


def test_missing_build_packages_are_named(monkeypatch):
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="setuptools, wheel"):
        toolchain.require_build_tools()


def test_a_failed_package_installation_gives_the_installers_last_words(monkeypatch, tmp_path):
    uv = tmp_path / "uv"
    uv.write_text("#!/bin/sh\necho resolving\necho '  error: no disk' >&2\nexit 2\n")
    uv.chmod(0o755)
    monkeypatch.setattr(toolchain, "scripts_path", lambda: str(tmp_path))
    with pytest.raises(EngineError, match="engine.whl cannot be installed into .*: error: no disk"):
        toolchain.install_packages("/cache/engine.whl", reinstall=True)


@pytest.mark.parametrize(
    ("device", "free", "cores", "jobs"),
    [("cpu", 99, 4, 4), ("cpu", 6, 4, 2), ("cuda", 6, 4, 1), ("cuda", 8, 4, 2), ("cpu", 1, 4, 1), ("cuda", None, 3, 3)],
)
def test_jobs_are_bounded_by_cores_and_memory(monkeypatch, device, free, cores, jobs):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(toolchain.os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(toolchain, "available_memory", lambda: None if free is None else free * 2**30)
    assert toolchain.parallel_jobs(device) == jobs


def test_jobs_can_be_set_and_must_be_a_number(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "7")
    assert toolchain.parallel_jobs("cuda") == 7
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(EngineError, match="MAX_JOBS=many"):
        toolchain.parallel_jobs("cpu")


@pytest.fixture
def no_headers(programs, monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "no-include"))
    return programs


def test_own_headers_need_nothing(programs, monkeypatch, tmp_path):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert toolchain.header_dirs() == ()


def test_missing_headers_without_apt_name_the_apt_command(no_headers):
    with pytest.raises(EngineError, match=f"sudo apt-get install {PYTHON}-dev"):
        toolchain.header_dirs()


# A stand-in for dpkg -x DEB FOLDER that "unpacks" the toolchain.
DPKG = f'mkdir -p "$3/usr/include/{PYTHON}" && touch "$3/usr/include/{PYTHON}/Python.h"'


def test_headers_are_fetched_once_with_private_lists_where_apt_has_none(no_headers, tmp_path):
    log = tmp_path / "apt.log"
    # Without lists of one's own apt finds no package; an update into a folder that is not prepared fails.
    script = f"""
echo "$@" >> {log}
for word in "$@"; do
    case $word in -oDir::State::lists=*) lists=${{word#*=}} ;; esac
done
case "$*" in
*update) [ -d "$lists/partial" ] && touch "$lists/index" ;;
*download*) [ -n "$lists" ] && [ -e "$lists/index" ] && touch "lib{PYTHON}-dev_1_amd64.deb" ;;
esac
"""
    no_headers("apt-get", script)
    no_headers("dpkg", DPKG)
    include_dirs = toolchain.header_dirs()
    assert (include_dirs[0] / "Python.h").is_file()
    assert include_dirs[0].parent == include_dirs[1]
    calls = log.read_text().splitlines()
    assert len(calls) == 3
    assert toolchain.header_dirs() == include_dirs
    assert log.read_text().splitlines() == calls


def test_headers_that_cannot_be_fetched_say_why_and_leave_nothing(no_headers, tmp_path):
    no_headers("apt-get", "echo 'E: no such package here' >&2; exit 100")
    no_headers("dpkg", DPKG)
    with pytest.raises(EngineError, match=f"no such package here.*sudo apt-get install {PYTHON}-dev"):
        toolchain.header_dirs()
    assert list((tmp_path / "cache" / "headers").iterdir()) == []


def make_openblas(folder, product):
    """A library that calls itself OpenBLAS 9.8.7 and answers every product with `product`."""
    (folder / "cblas.h").write_text(
        "enum {CblasRowMajor, CblasNoTrans};\n"
        "void cblas_dgemm(int, int, int, int, int, int, double, double*, int, double*, int, double, double*, int);\n"
    )
    (folder / "blas.cpp").write_text(
        'extern "C" {\n#include "cblas.h"\n'
        "void cblas_dgemm(int, int, int, int, int, int, double, double*, int, double*, int, double, double* c, int)"
        f"{{ *c = {product}; }}\n"
        'const char *openblas_get_config() { return "OpenBLAS 9.8.7 TEST"; }\n}\n'
    )
    command = ["c++", "-shared", "-fPIC", str(folder / "blas.cpp"), "-o", str(folder / "libopenblas.so")]
    subprocess.run(command, check=True)
    return [f"-I{folder}"], [f"-L{folder}", "-lopenblas", f"-Wl,-rpath,{folder}"]


@pytest.mark.parametrize(("product", "name"), [(15, "openblas"), (16, toolchain.PYPI_PACKAGE)])
def test_a_system_openblas_is_taken_if_it_computes(monkeypatch, tmp_path, product, name):
    flags = make_openblas(tmp_path, product)
    monkeypatch.setattr(toolchain, "_system_flags", lambda: iter([([], ["-lno_such_library"]), flags]))
    found = toolchain.find_blas()
    assert found.name == name
    if name == "openblas":
        assert found.version == "9.8.7"
        assert found.requirement is None
        assert (list(found.compile_flags), list(found.link_flags)) == flags
        assert toolchain.prepare_blas(found) == found


def test_pkg_config_is_asked_first(programs):
    programs("pkg-config", 'case $1 in --cflags) echo "-I/a b" ;; --libs) echo -L/c -lopenblas ;; esac')
    assert next(toolchain._system_flags()) == (["-I/a", "b"], ["-L/c", "-lopenblas"])


def test_the_pypi_package_is_installed_at_its_pinned_version(monkeypatch, tmp_path):
    home = tmp_path / toolchain.PYPI_MODULE
    home.mkdir()
    (home / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    wanted = []
    monkeypatch.setattr(toolchain, "install_packages", lambda *requirements: wanted.extend(requirements))
    monkeypatch.setattr(toolchain, "installed_version", lambda name: "0.1")
    monkeypatch.setattr(toolchain, "find_compiler", lambda: None)
    ready = toolchain.prepare_blas(toolchain.find_blas())
    assert wanted == [f"scipy-openblas32=={toolchain.PYPI_VERSION}"] == [ready.requirement]
    assert f"-I{home}/include" in ready.compile_flags
    assert "-Dcblas_dgemm=scipy_cblas_dgemm" in ready.compile_flags
    assert "-Wl,-rpath,$ORIGIN/../scipy_openblas32/lib" in ready.link_flags
    monkeypatch.setattr(toolchain, "installed_version", lambda name: toolchain.PYPI_VERSION)
    assert toolchain.prepare_blas(toolchain.find_blas()) == ready
    assert len(wanted) == 1


@pytest.fixture
def gpu_torch(programs, monkeypatch, tmp_path):
    """A torch that was built for CUDA 13.0 and sees no GPU, and no toolkit; returns the toolkit's future home."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(toolchain, "_DEFAULT_CUDA_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    return tmp_path / "cuda"


def make_toolkit(home, version="release 13.0, V13.0.88"):
    (home / "include").mkdir(parents=True)
    (home / "include" / "cuda_runtime.h").touch()
    (home / "bin").mkdir()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, {version}'\n")
    nvcc.chmod(0o755)


def test_without_a_gpu_the_build_is_for_the_cpu(gpu_torch):
    make_toolkit(gpu_torch)
    assert toolchain.find_cuda() is None


def test_forced_cuda_names_what_is_missing(gpu_torch, monkeypatch):
    with pytest.raises(EngineError, match="CUDA toolkit 13.0"):
        toolchain.find_cuda("cuda")
    make_toolkit(gpu_torch)
    with pytest.raises(EngineError, match="TORCH_CUDA_ARCH_LIST"):
        toolchain.find_cuda("cuda")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    assert toolchain.find_cuda("cuda") == toolchain.Cuda(gpu_torch, (13, 0), "8.0;9.0")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(EngineError, match="without CUDA"):
        toolchain.find_cuda("cuda")


@pytest.mark.parametrize(
    ("release", "said"),
    [
        ("release 12.4, V12.4.88", r"nvcc in .* is 12\.4.*CUDA 13\.0"),
        ("nothing", "nvcc does not tell its version: reinstall"),
        ("'; exit 3; '", "nvcc does not run .*exit status 3.*: reinstall"),
    ],
)
def test_a_toolkit_that_does_not_fit_is_refused(gpu_torch, release, said):
    make_toolkit(gpu_torch, release)
    with pytest.raises(EngineError, match=said):
        toolchain.find_cuda("cuda")


def test_a_gpu_decides_unless_the_cpu_is_forced(gpu_torch, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0) if index else (8, 6))
    assert toolchain.find_cuda() is None
    assert "no nvcc: building for the CPU" in capsys.readouterr().out
    make_toolkit(gpu_torch)
    found = toolchain.find_cuda()
    assert found is not None
    assert found.archs == "8.6;9.0"
    assert toolchain.find_cuda("cpu") is None
