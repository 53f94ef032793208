"""Building, caching and installing: on a miniature MinkowskiEngine, so that nothing is compiled for minutes."""

import io
import json
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from spark_me.engine import build, edits, install, source
from spark_me.engine.target import Cuda, Target
from spark_me.engine.toolchain import Blas
from spark_me.errors import EngineError

TARGET = Target(python=(3, 11), abi="cpython-311", platform="linux-x86_64", torch="2.11.0+cu130", cuda=None)
BLAS = Blas("openblas", "0.3.21")
CUDA = Cuda(home=Path("/usr/local/cuda"), version=(13, 0), archs="9.0")

MINIATURE_SETUP = """
import json
from setuptools import setup
options = json.load(open("build_options.json"))
print("[1/2] c++ -c src/first.cpp"); print("[2/2] c++ -c src/second.cpp")
setup(name="MinkowskiEngine", version=options["version"], packages=["MinkowskiEngine"],
      package_data={"MinkowskiEngine": [options["record"]]})
"""


MODULE = {"MinkowskiEngine/__init__.py": b"answer = 'old'\n"}


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"MinkowskiEngine-0.5.4/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))


@pytest.fixture
def miniature(monkeypatch, tmp_path):
    """An archive with one module, one edit for it, and a build script without a compiler."""
    monkeypatch.setenv("SPARK_ME_CACHE", str(tmp_path / "cache"))
    archive = tmp_path / "MinkowskiEngine-0.5.4.tar.gz"
    write_archive(archive, MODULE)
    swap = edits.Edit("swap", "MinkowskiEngine/*.py", "old", "new", 1, "a test")
    for module in (build, build):
        monkeypatch.setattr(module, "edits_for", lambda target: (swap,))
        monkeypatch.setattr(module, "setup_script", lambda: MINIATURE_SETUP)
    monkeypatch.setattr(build, "require_compiler", lambda: "c++")
    monkeypatch.setattr(build, "header_dirs", lambda: ())
    return archive


def carried_record(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return build.BuildRecord(**json.loads(archive.read(f"MinkowskiEngine/{build.RECORD_NAME}")))


def test_a_build_ends_as_an_edited_wheel_in_the_cache(miniature, tmp_path, capsys):
    made_from = build.record_of(TARGET, BLAS)
    left = source.make_dir("build", f"{made_from.key}-killed")
    (left / "object.o").touch()
    wheel = build.build_wheel(miniature, TARGET, BLAS, made_from)
    assert wheel == source.cached_wheel(made_from.key)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("MinkowskiEngine/__init__.py") == b"answer = 'new'\n"
    assert carried_record(wheel) == made_from
    assert list((tmp_path / "cache" / "build").iterdir()) == []
    drawn = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in drawn] == ["first.cpp", "second.cpp"]


def test_a_build_that_fails_prints_cause_and_log_and_caches_nothing(miniature, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "setup_script", lambda: "print('x.cpp:3:1: error: no such type'); raise SystemExit(3)")
    made_from = build.record_of(TARGET, BLAS)
    with pytest.raises(EngineError, match=r"x\.cpp:3:1: error: no such type; log: ") as caught:
        build.build_wheel(miniature, TARGET, BLAS, made_from)
    log = Path(str(caught.value).split("log: ")[1])
    assert "no such type" in log.read_text()
    assert "\n" not in str(caught.value)
    assert source.cached_wheel(made_from.key) is None
    assert list((tmp_path / "cache" / "build").iterdir()) == []


def test_the_real_build_script_reports_what_ninja_says(miniature, monkeypatch, tmp_path):
    script = build.resources.files("spark_me.engine").joinpath("resources", "setup.py").read_text()
    monkeypatch.setattr(build, "setup_script", lambda: script)
    package = {f"MinkowskiEngine{folder}/__init__.py": b"" for folder in ("/utils", "/modules")}
    write_archive(miniature, {**MODULE, **package, "src/math_functions_cpu.cpp": b""})
    with pytest.raises(EngineError, match=r"ninja: error: .*\.cpp.* missing"):
        build.build_wheel(miniature, TARGET, BLAS, build.record_of(TARGET, BLAS))


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("note\na.cu(3): error: first\nb.cpp:1: error: second\nRuntimeError: Error compiling", "a.cu(3): error: first"),
        (
            "g++: fatal error: Killed signal terminated program",
            "g++: fatal error: Killed signal terminated program (out",
        ),
        ("ld: a.o: undefined reference to `f'\ncollect2: ld returned 1", "ld: a.o: undefined reference to `f'"),
        ("Traceback\n  File x\nModuleNotFoundError: No module named 'torch'\n", "ModuleNotFoundError: No module named"),
        ("write: No space left on device\n", "write: No space left on device"),
        ("first\nlast\n\n", "last"),
        ("", "it said nothing"),
    ],
)
def test_the_cause_is_the_line_that_tells_most(output, cause):
    assert build.find_cause(output).startswith(cause)


def test_leaving_a_build_early_ends_its_processes(monkeypatch, tmp_path):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "_follow", interrupt)
    processes = []
    start = build.subprocess.Popen

    def recording(*args, **kwargs):
        processes.append(start(*args, **kwargs))
        return processes[-1]

    monkeypatch.setattr(build.subprocess, "Popen", recording)
    with pytest.raises(KeyboardInterrupt):
        build.run_build([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, tmp_path / "log", {})
    assert processes[0].returncode == -build.signal.SIGKILL


def test_the_key_changes_with_every_ingredient(monkeypatch):
    made_from = build.record_of(TARGET, BLAS)
    assert build.record_of(replace(TARGET), replace(BLAS)).key == made_from.key
    keys = {made_from.key}
    targets = [
        replace(TARGET, torch="2.11.0+cpu"),
        replace(TARGET, abi="cpython-312"),
        replace(TARGET, platform="linux-aarch64"),
        replace(TARGET, cuda=CUDA),
        replace(TARGET, cuda=replace(CUDA, version=(13, 1))),
        replace(TARGET, cuda=replace(CUDA, archs="8.0;9.0")),
    ]
    keys |= {build.record_of(target, BLAS).key for target in targets}
    keys |= {build.record_of(TARGET, replace(BLAS, **change)).key for change in ({"version": "1"}, {"name": "other"})}
    monkeypatch.setattr(build, "edits_for", lambda target: edits.EDITS[1:])
    keys.add(build.record_of(TARGET, BLAS).key)
    monkeypatch.setattr(build, "edits_for", lambda target: edits.edits_for(target))
    monkeypatch.setattr(build, "setup_script", lambda: "another")
    keys.add(build.record_of(TARGET, BLAS).key)
    monkeypatch.setattr(build, "ENGINE_VERSION", "0.5.5")
    keys.add(build.record_of(TARGET, BLAS).key)
    assert len(keys) == 12


@pytest.fixture
def environment(miniature, monkeypatch):
    """`install` on the miniature, with a stand-in for the installed engine: returns what happened, in order."""
    done = []
    installed = {"record": None, "problem": None}

    def put(wheel, reinstall):
        done.append("installed")
        installed["record"] = carried_record(wheel)

    real_build = build.build_wheel

    def counted_build(*args):
        done.append("built")
        return real_build(*args)

    monkeypatch.setattr(install, "find_target", lambda device: TARGET)
    monkeypatch.setattr(install, "find_blas", lambda compiler: BLAS)
    monkeypatch.setattr(install, "get_archive", lambda source: miniature)
    monkeypatch.setattr(install, "build_wheel", counted_build)
    monkeypatch.setattr(install, "install_packages", put)
    monkeypatch.setattr(install, "installed_record", lambda: installed["record"])
    monkeypatch.setattr(install, "import_problem", lambda wheel=None: installed["problem"])
    return done, installed


def test_install_builds_once_then_uses_the_cache_then_does_nothing(environment, capsys):
    done, installed = environment
    install.install()
    assert done == ["built", "installed"]
    install.install()
    assert done == ["built", "installed"]
    assert "already installed" in capsys.readouterr().out
    installed["record"] = None
    install.install()
    assert done == ["built", "installed", "installed"]
    install.install(rebuild=True)
    assert done == ["built", "installed", "installed", "built", "installed"]


def test_an_engine_that_does_not_import_is_installed_again_and_reported(environment):
    done, installed = environment
    install.install()
    installed["problem"] = "ImportError: undefined symbol"
    with pytest.raises(EngineError, match=r"undefined symbol.*--rebuild"):
        install.install()
    assert done == ["built", "installed", "installed"]


def test_build_only_fills_the_cache_and_installs_nothing(environment, capsys):
    done, installed = environment
    install.install(build_only=True)
    install.install(build_only=True)
    assert done == ["built"]
    assert "is built and loads" in capsys.readouterr().out
    installed["problem"] = "ImportError: undefined symbol: f"
    with pytest.raises(EngineError, match=r"does not import: ImportError: undefined symbol: f"):
        install.install(build_only=True)
    assert done == ["built"]


@pytest.mark.parametrize(("text", "problem"), [(b"", None), (b"import no_such_module", "no_such_module")])
def test_a_wheel_is_tried_without_being_installed(tmp_path, text, problem):
    with zipfile.ZipFile(tmp_path / "engine.whl", "w") as wheel:
        wheel.writestr("MinkowskiEngine/__init__.py", text)
    said = install.import_problem(tmp_path / "engine.whl")
    assert said is None if problem is None else problem in said


def test_a_cuda_build_reads_the_toolkits_headers_before_torchs(monkeypatch, tmp_path):
    (tmp_path / "cu13" / "include").mkdir(parents=True)
    monkeypatch.setattr(build, "_nvidia_packages", lambda: tmp_path)
    assert build._cuda_include_dirs(CUDA) == [CUDA.home / "include", tmp_path / "cu13" / "include"]
    assert build._cuda_include_dirs(None) == []


def test_a_cache_that_cannot_be_written_is_one_line(environment, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARK_ME_CACHE", str(tmp_path / "file"))
    with pytest.raises(EngineError, match="Not a directory.*SPARK_ME_CACHE") as caught:
        install.install()
    assert "\n" not in str(caught.value)
