"""One build of MinkowskiEngine: unpack, edit, compile, and a wheel in the cache."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from spark_me.engine import ENGINE_NAME, ENGINE_VERSION
from spark_me.engine.blas import Blas, prepare_blas
from spark_me.engine.cache import make_dir, store_wheel
from spark_me.engine.edits import apply_edits, edits_for
from spark_me.engine.headers import header_dirs
from spark_me.engine.packages import scripts_path
from spark_me.engine.progress import Progress
from spark_me.engine.record import RECORD_NAME, BuildRecord, setup_script
from spark_me.engine.source import unpack
from spark_me.engine.target import Cuda, Target
from spark_me.engine.toolchain import parallel_jobs, require_build_packages, require_compiler
from spark_me.errors import EngineError

# The build backend's own entry point: what pip would call, without pip between us and the compiler's output.
_BUILD = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
_COMPILER_ERROR = re.compile(r"\berror: |\bfatal error\b|\bnvcc fatal\b|undefined reference|No space left on device")
_PYTHON_ERROR = re.compile(r"[\w.]*(Error|Exception): ")


def build_wheel(archive: Path, target: Target, blas: Blas, record: BuildRecord) -> Path:
    """Build the wheel that `record` describes and put it into the cache. One process at a time builds a record.

    Args:
        archive: the checked source archive.
        target, blas: what to build for and with.
        record: their record; the wheel carries it and is cached under its key.

    Raises:
        EngineError: if something that the build needs is missing, or the build fails, with its cause and log.
    """
    require_compiler()
    require_build_packages()
    blas = prepare_blas(blas)
    includes = [*header_dirs(), *_cuda_include_dirs(target.cuda)]
    for left in make_dir("build").glob(f"{record.key}-*"):  # by a build that was killed: hundreds of megabytes
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=make_dir("build"), prefix=f"{record.key}-") as directory:
        tree = unpack(archive, Path(directory))
        apply_edits(tree, edits_for(target))
        (tree / "setup.py").write_text(setup_script(), encoding="utf-8")
        (tree / ENGINE_NAME / RECORD_NAME).write_text(record.to_json(), encoding="utf-8")
        (tree / "build_options.json").write_text(json.dumps(_options(target, blas, includes)), encoding="utf-8")
        log = make_dir("logs") / f"{record.key}.log"
        run_build([sys.executable, "-c", _BUILD], tree, log, _environment(target.cuda))
        return store_wheel(next((tree / "dist").glob("*.whl")), record.key)


def run_build(command: Sequence[str], directory: Path, log: Path, environment: Mapping[str, str]) -> None:
    """Run a build, drawing its progress and keeping all its output in `log`.

    Raises:
        EngineError: if it fails; one line with the first cause found in the output, and the log's place.
    """
    progress = Progress(f"building {ENGINE_NAME} {ENGINE_VERSION}", sys.stdout)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _follow(process, file, progress)
        finally:
            # Left early by Ctrl-C or a full disk: the compilers, all in one group, must not go on alone.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            progress.close()
    if process.returncode:
        raise EngineError(f"{ENGINE_NAME} does not build: {find_cause(log.read_text(errors='replace'))}; log: {log}")


def find_cause(output: str) -> str:
    """The line of a failed build's output that tells most: the first compiler error, else the last Python error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line in lines:
        if _COMPILER_ERROR.search(line):
            hint = " (out of memory: set MAX_JOBS=1)" if "Killed signal" in line else ""
            return line + hint
    for line in reversed(lines):
        if _PYTHON_ERROR.match(line):
            return line
    return lines[-1] if lines else "it said nothing"


def _follow(process: subprocess.Popen[bytes], log: BinaryIO, progress: Progress) -> None:
    """Copy the output to the log and show its steps until the build ends."""
    assert process.stdout is not None
    pending = b""
    while True:
        readable, _, _ = select.select([process.stdout], [], [], 1.0)
        if readable:
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                break
            log.write(chunk)
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                progress.read(line.decode(errors="replace"))
        progress.tick()
    process.wait()


def _options(target: Target, blas: Blas, include_dirs: Sequence[Path]) -> dict[str, object]:
    """What resources/setup.py reads."""
    return {
        "version": ENGINE_VERSION,
        "device": target.device,
        "record": RECORD_NAME,
        "include_dirs": [str(directory) for directory in include_dirs],
        "compile_flags": list(blas.compile_flags),
        "link_flags": [*blas.link_flags, *_cuda_link_flags(target.cuda)],
        "requires": [blas.requirement] if blas.requirement else [],
    }


def _environment(cuda: Cuda | None) -> dict[str, str]:
    environment = {
        **os.environ,
        "PATH": scripts_path(),
        "MAX_JOBS": str(parallel_jobs("cpu" if cuda is None else "cuda")),
        # The forms that the progress and the cause are read from, whatever the user's settings.
        "NINJA_STATUS": "[%f/%t] ",
        "LC_ALL": "C",
    }
    if cuda is not None:
        environment |= {"CUDA_HOME": str(cuda.home), "TORCH_CUDA_ARCH_LIST": cuda.archs}
    return environment


def _cuda_include_dirs(cuda: Cuda | None) -> list[Path]:
    """The toolkit's own headers, then those of torch's nvidia packages: nvcc comes without cuSPARSE and its friends."""
    return [cuda.home / "include", *sorted(_nvidia_packages().glob("*/include"))] if cuda else []


def _cuda_link_flags(cuda: Cuda | None) -> list[str]:
    if cuda is None:
        return []
    # The packages carry libcusparse.so.12 without the plain name that -lcusparse looks for.
    for library in sorted(_nvidia_packages().glob("*/lib/libcusparse.so.*")):
        return [f"-L{library.parent}", f"-l:{library.name}"]
    return ["-lcusparse"]


def _nvidia_packages() -> Path:
    return Path(sysconfig.get_path("purelib"), "nvidia")
