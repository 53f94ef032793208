"""Building, caching and installing: on a miniature MinkowskiEngine, so that nothing is compiled for minutes."""

import io
import json
import sys
import tarfile
import zipfile
from dataclasses import fields, replace
from pathlib import Path

import pytest

from spark_me.engine import build, edits, install, source
from spark_me.engine.build import Progress
from spark_me.engine.toolchain import Blas, Cuda
from spark_me.errors import EngineError

BLAS = Blas("openblas", "0.3.21")
CUDA = Cuda(home=Path("/usr/local/cuda"), version=(13, 0), archs="9.0")
RECORD = build.record_of(None, BLAS)

MINIATURE_SETUP = """
import json
from setuptools import setup
options = json.load(open("build_options.json"))
print("[1/2] c++ -c src/first.cpp"); print("[2/2] c++ -c src/second.cpp")
setup(name="MinkowskiEngine", version=options["version"], packages=["MinkowskiEngine"],
      package_data={"MinkowskiEngine": [options["record"]]})
"""
MODULE = {"MinkowskiEngine/__init__.py": b"answer = 'old'\n"}
SWAP = edits.Edit("swap", "", "a test", "MinkowskiEngine/*.py", "old", "new", 1)


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"MinkowskiEngine-0.5.4/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))


@pytest.fixture
def setup_script(monkeypatch, tmp_path):
    """The build script in the place of ours: one without a compiler."""
    script = tmp_path / "setup.py"
    script.write_text(MINIATURE_SETUP)
    monkeypatch.setattr(build, "SETUP_SCRIPT", script)
    return script


@pytest.fixture
def miniature(setup_script, monkeypatch, tmp_path):
    """An archive with one module, and one edit for it."""
    monkeypatch.setenv("SPARK_ME_CACHE", str(tmp_path / "cache"))
    archive = tmp_path / "MinkowskiEngine-0.5.4.tar.gz"
    write_archive(archive, MODULE)
    monkeypatch.setattr(build, "edits_for", lambda device: (SWAP,))
    monkeypatch.setattr(build, "require_build_tools", lambda: None)
    monkeypatch.setattr(build, "header_dirs", lambda: ())
    return archive


def carried_record(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return build.BuildRecord(**json.loads(archive.read(f"MinkowskiEngine/{build.RECORD_NAME}")))


def test_a_build_ends_as_an_edited_wheel_in_the_cache(miniature, tmp_path, capsys):
    left = source.make_dir("build", f"{RECORD.key}-killed")
    (left / "object.o").touch()
    wheel = build.build_wheel(miniature, None, BLAS, RECORD)
    assert wheel == source.cached_wheel(RECORD.key)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("MinkowskiEngine/__init__.py") == b"answer = 'new'\n"
    assert carried_record(wheel) == RECORD
    assert list((tmp_path / "cache" / "build").iterdir()) == []
    drawn = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in drawn] == ["first.cpp", "second.cpp"]


def test_a_build_that_fails_prints_cause_and_log_and_caches_nothing(miniature, setup_script, tmp_path):
    setup_script.write_text("print('x.cpp:3:1: error: no such type'); raise SystemExit(3)")
    with pytest.raises(EngineError, match=r"x\.cpp:3:1: error: no such type; log: ") as caught:
        build.build_wheel(miniature, None, BLAS, RECORD)
    log = Path(str(caught.value).split("log: ")[1])
    assert "no such type" in log.read_text()
    assert "\n" not in str(caught.value)
    assert source.cached_wheel(RECORD.key) is None
    assert list((tmp_path / "cache" / "build").iterdir()) == []


def test_the_real_build_script_reports_what_ninja_says(miniature, setup_script):
    setup_script.write_bytes((Path(build.__file__).parent / "resources" / "setup.py").read_bytes())
    package = {f"MinkowskiEngine{folder}/__init__.py": b"" for folder in ("/utils", "/modules")}
    write_archive(miniature, {**MODULE, **package, "src/math_functions_cpu.cpp": b""})
    with pytest.raises(EngineError, match=r"ninja: error: .*\.cpp.* missing"):
        build.build_wheel(miniature, None, BLAS, RECORD)


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

    monkeypatch.setattr(build.select, "select", interrupt)
    processes = []
    start = build.subprocess.Popen

    def recording(*args, **kwargs):
        processes.append(start(*args, **kwargs))
        return processes[-1]

    monkeypatch.setattr(build.subprocess, "Popen", recording)
    with pytest.raises(KeyboardInterrupt):
        build.run_build([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, tmp_path / "log", {})
    assert processes[0].returncode == -build.signal.SIGKILL


def test_the_key_changes_with_every_ingredient(setup_script, monkeypatch):
    made_from = build.record_of(None, BLAS)
    assert build.record_of(None, replace(BLAS)).key == made_from.key
    keys = [made_from.key]
    keys += [replace(made_from, **{field.name: "other"}).key for field in fields(made_from)]
    cudas = [CUDA, replace(CUDA, version=(13, 1)), replace(CUDA, archs="8.0;9.0")]
    keys += [build.record_of(cuda, BLAS).key for cuda in cudas]
    keys += [build.record_of(None, replace(BLAS, **change)).key for change in ({"version": "1"}, {"name": "other"})]
    for place, name, value in (
        (build.torch, "__version__", "2.11.0+other"),
        (build.sysconfig, "get_config_var", lambda name: "cpython-399"),
        (build.sysconfig, "get_platform", lambda: "linux-aarch64"),
        (build, "edits_for", lambda device: edits.EDITS[1:]),
        (build, "ENGINE_VERSION", "0.5.5"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            keys.append(build.record_of(None, BLAS).key)
    setup_script.write_text("another")
    keys.append(build.record_of(None, BLAS).key)
    assert len(set(keys)) == len(keys) == 20


@pytest.fixture
def environment(miniature, monkeypatch):
    """`install` on the miniature, with a stand-in for the installed engine: returns what happened, in order."""
    done = []
    installed = {"record": None, "problem": None}

    def put(wheel, reinstall):
        done.append("installed")
        installed["record"] = carried_record(wheel)

    def counted_build(*args):
        done.append("built")
        return build.build_wheel(*args)

    monkeypatch.setattr(install, "find_cuda", lambda device: None)
    monkeypatch.setattr(install, "find_blas", lambda: BLAS)
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
    package = tmp_path / "nvidia" / "cu13"
    (package / "include").mkdir(parents=True)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    assert build.cuda_flags(CUDA) == ([CUDA.home / "include", package / "include"], ["-lcusparse"])
    (package / "lib").mkdir()
    (package / "lib" / "libcusparse.so.12").touch()
    assert build.cuda_flags(CUDA)[1] == [f"-L{package / 'lib'}", "-l:libcusparse.so.12"]


def test_a_cache_that_cannot_be_written_is_one_line(environment, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARK_ME_CACHE", str(tmp_path / "file"))
    with pytest.raises(EngineError, match="Not a directory.*SPARK_ME_CACHE") as caught:
        install.install()
    assert "\n" not in str(caught.value)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("line", "drawn"),
    [
        ("[3/13] c++ -MF /b/x.o.d -c -c /tmp/me/src/convolution_cpu.cpp -o /b/src/convolution_cpu.o -O3", "3/13"),
        ("  [10/20] nvcc -c src/gpu.cu -o gpu.o", "10/20"),
        ("copying [1/2] file", None),
        ("error: [x/y]", None),
    ],
)
def test_steps_are_read_from_ninja(line, drawn):
    stream = io.StringIO()
    Progress("building", stream, clock=lambda: 0).read(line)
    name = {"3/13": "convolution_cpu.cpp", "10/20": "gpu.cu"}.get(drawn)
    assert stream.getvalue() == (f"building: {drawn}  0:00  {name}\n" if drawn else "")


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_progress_is_one_line_on_a_terminal_and_plain_lines_elsewhere(stream):
    seconds = iter(range(0, 1000, 65))
    progress = Progress("building", stream, clock=lambda: next(seconds))
    for line in ("[1/2] c++ a.cpp", "noise", "[2/2] c++ b.cpp"):
        progress.read(line)
        progress.tick()
    progress.close()
    text = stream.getvalue()
    if stream.isatty():
        assert text.count("\n") == 1
        assert text.endswith("\n")
        assert "2/2 files" in text.split("\r")[-1]
        assert "1:05" in text.split("\r")[1]
    else:
        assert text == "building: 1/2  1:05  a.cpp\nbuilding: 2/2  2:10  b.cpp\n"
