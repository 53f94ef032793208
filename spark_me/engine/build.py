"""One build of MinkowskiEngine: key and record; unpacking, editing, compiling with progress; a wheel in the cache."""

import hashlib
import importlib.metadata
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
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch

from spark_me.engine import ENGINE_NAME, ENGINE_VERSION
from spark_me.engine.edits import apply_edits, digest, edits_for
from spark_me.engine.source import make_dir, store_wheel, unpack
from spark_me.engine.toolchain import (
    Blas,
    Cuda,
    header_dirs,
    last_line,
    parallel_jobs,
    require_build_tools,
    scripts_path,
)
from spark_me.errors import EngineError

RECORD_NAME = "spark_me_build.json"
SETUP_SCRIPT = Path(__file__).parent / "resources" / "setup.py"
"""Takes the place of upstream's."""


@dataclass(frozen=True)
class BuildRecord:
    """All that decides what a built wheel contains and where it fits. Any difference gives another key."""

    engine: str  # MinkowskiEngine's version
    edits: str  # fingerprint of our edits and our build script
    torch: str  # with its local part: "2.11.0+cu130"
    abi: str  # tag of Python's extension modules: "cpython-311-x86_64-linux-gnu"
    platform: str  # "linux-x86_64"
    device: str  # "cpu" or "cuda"
    cuda: str  # toolkit version and GPU architectures, "" for a CPU build
    blas: str  # library and version

    @property
    def key(self) -> str:
        """Name of this build in the cache: 16 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The record as the installed engine carries it."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)


def record_of(cuda: Cuda | None, blas: Blas) -> BuildRecord:
    """The record of a build for this environment, for a CUDA toolkit or for the CPU."""
    device = "cuda" if cuda else "cpu"
    return BuildRecord(
        engine=ENGINE_VERSION,
        edits=digest(edits_for(device), SETUP_SCRIPT.read_bytes())[:16],
        torch=torch.__version__,
        abi=str(sysconfig.get_config_var("SOABI")),
        platform=sysconfig.get_platform(),
        device=device,
        cuda=f"{cuda.version[0]}.{cuda.version[1]} for {cuda.archs}" if cuda else "",
        blas=f"{blas.name} {blas.version}",
    )


def installed_record() -> BuildRecord | None:
    """The record of the installed engine; None if there is none, or if this spark_me did not build it."""
    try:
        path = importlib.metadata.distribution(ENGINE_NAME).locate_file(f"{ENGINE_NAME}/{RECORD_NAME}")
        return BuildRecord(**json.loads(Path(str(path)).read_text(encoding="utf-8")))
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError, TypeError):
        return None  # the last two: cut short, or written by a spark_me with other fields


class Progress:
    """Draws a build's steps on `stream`: redrawn in place on a terminal, else one plain line a step.

    Args:
        label: what is being built.
        stream: where to draw.
        clock: seconds, for the elapsed time.
    """

    _STEP = re.compile(r"\s*\[(\d+)/(\d+)\] ")
    _SOURCE = re.compile(r"([\w.-]+\.(?:cpp|cu|cc))\b")
    _WIDTH = 24

    def __init__(self, label: str, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._label, self._stream, self._clock = label, stream, clock
        self._start = clock()
        self._done, self._total = 0, 0

    def read(self, line: str) -> None:
        """Take in one line of ninja's output; most report no step."""
        if step := self._STEP.match(line):
            self._done, self._total = int(step[1]), int(step[2])
            if not self._stream.isatty():
                source = self._SOURCE.findall(line)[-1:]
                self._write("  ".join([f"{self._label}: {self._done}/{self._total}", self._elapsed(), *source]) + "\n")

    def tick(self) -> None:
        """Redraw, so that the elapsed time moves while a long file compiles."""
        if self._stream.isatty():
            filled = "#" * (self._WIDTH * self._done // self._total if self._total else 0)
            count = f"{self._done}/{self._total} files" if self._total else "preparing"
            self._write(f"\r{self._label} [{filled:.<{self._WIDTH}}] {count}  {self._elapsed()}  \b\b")

    def close(self) -> None:
        """Leave the drawn line behind."""
        self.tick()
        if self._stream.isatty():
            self._write("\n")

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(self._clock() - self._start), 60)
        return f"{minutes}:{seconds:02d}"

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def build_wheel(archive: Path, cuda: Cuda | None, blas: Blas, record: BuildRecord) -> Path:
    """Build the wheel that `record` describes and put it into the cache. One process at a time builds a record.

    Args:
        archive: the checked source archive.
        cuda, blas: what to build with; the BLAS as `prepare_blas` gives it.
        record: their record; the wheel carries it and is cached under its key.

    Raises:
        EngineError: if something that the build needs is missing, or the build fails, with its cause and log.
    """
    require_build_tools()
    cuda_includes, cuda_links = cuda_flags(cuda) if cuda else ([], [])
    options = {  # what resources/setup.py reads
        "version": ENGINE_VERSION,
        "device": record.device,
        "record": RECORD_NAME,
        "include_dirs": [str(directory) for directory in (*header_dirs(), *cuda_includes)],
        "compile_flags": blas.compile_flags,
        "link_flags": [*blas.link_flags, *cuda_links],
        "requires": [blas.requirement] if blas.requirement else [],
    }
    environment = {
        **os.environ,
        "PATH": scripts_path(),
        "MAX_JOBS": str(parallel_jobs(record.device)),
        # The forms that the progress and the cause are read from, whatever the user's settings.
        "NINJA_STATUS": "[%f/%t] ",
        "LC_ALL": "C",
        **({"CUDA_HOME": str(cuda.home), "TORCH_CUDA_ARCH_LIST": cuda.archs} if cuda else {}),
    }
    # The build backend's own entry point: what pip would call, without pip between us and the compiler's output.
    command = [sys.executable, "-c", "from setuptools.build_meta import build_wheel; build_wheel('dist')"]
    for left in make_dir("build").glob(f"{record.key}-*"):  # by a build that was killed: hundreds of megabytes
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=make_dir("build"), prefix=f"{record.key}-") as directory:
        tree = unpack(archive, Path(directory))
        apply_edits(tree, edits_for(record.device))
        shutil.copyfile(SETUP_SCRIPT, tree / "setup.py")
        (tree / ENGINE_NAME / RECORD_NAME).write_text(record.to_json(), encoding="utf-8")
        (tree / "build_options.json").write_text(json.dumps(options), encoding="utf-8")
        run_build(command, tree, make_dir("logs") / f"{record.key}.log", environment)
        return store_wheel(next((tree / "dist").glob("*.whl")), record.key)


def cuda_flags(cuda: Cuda) -> tuple[list[Path], list[str]]:
    """Include folders and linker's flags: nvcc comes without cuSPARSE and its friends, which torch's packages have."""
    packages = Path(sysconfig.get_path("purelib"), "nvidia")
    # They carry libcusparse.so.12 without the plain name that -lcusparse looks for.
    libraries = sorted(packages.glob("*/lib/libcusparse.so.*"))
    links = [f"-L{libraries[0].parent}", f"-l:{libraries[0].name}"] if libraries else ["-lcusparse"]
    return [cuda.home / "include", *sorted(packages.glob("*/include"))], links


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
            assert process.stdout is not None
            chunk, pending = b"\n", b""
            while chunk:
                if select.select([process.stdout], [], [], 1.0)[0]:
                    chunk = os.read(process.stdout.fileno(), 1 << 16)
                    file.write(chunk)
                    *lines, pending = (pending + chunk).split(b"\n")
                    for line in lines:
                        progress.read(line.decode(errors="replace"))
                progress.tick()
            process.wait()
        finally:
            # Left early by Ctrl-C or a full disk: the compilers, all in one group, must not go on alone.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            progress.close()
    if process.returncode:
        raise EngineError(f"{ENGINE_NAME} does not build: {find_cause(log.read_text(errors='replace'))}; log: {log}")


_COMPILER_ERROR = re.compile(r"\berror: |\bfatal error\b|\bnvcc fatal\b|undefined reference|No space left on device")
_PYTHON_ERROR = re.compile(r"[\w.]*(Error|Exception): ")


def find_cause(output: str) -> str:
    """The line of a failed build's output that tells most: the first compiler error, else the last Python error."""
    lines = [line.strip() for line in output.splitlines()]
    for line in filter(_COMPILER_ERROR.search, lines):
        return line + (" (out of memory: set MAX_JOBS=1)" if "Killed signal" in line else "")
    for line in filter(_PYTHON_ERROR.match, reversed(lines)):
        return line
    return last_line(output)
