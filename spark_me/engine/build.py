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
from importlib import resources
from pathlib import Path
from typing import BinaryIO, TextIO

from spark_me.engine import ENGINE_NAME, ENGINE_VERSION
from spark_me.engine.edits import apply_edits, digest, edits_for
from spark_me.engine.source import make_dir, store_wheel, unpack
from spark_me.engine.target import Cuda, Target
from spark_me.engine.toolchain import (
    Blas,
    header_dirs,
    parallel_jobs,
    prepare_blas,
    require_build_packages,
    require_compiler,
    scripts_path,
)
from spark_me.errors import EngineError

RECORD_NAME = "spark_me_build.json"


@dataclass(frozen=True)
class BuildRecord:
    """All that decides what a built wheel contains and where it fits. Any difference gives another key.

    Attributes:
        engine: MinkowskiEngine's version.
        edits: fingerprint of our edits and our build script.
        torch: torch's full version.
        abi: tag of Python's extension modules.
        platform: operating system and machine.
        device: "cpu" or "cuda".
        cuda: toolkit version and GPU architectures, "" for a CPU build.
        blas: BLAS library and its version.
    """

    engine: str
    edits: str
    torch: str
    abi: str
    platform: str
    device: str
    cuda: str
    blas: str

    @property
    def key(self) -> str:
        """Name of this build in the cache: 16 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The record as the installed engine carries it."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)


def record_of(target: Target, blas: Blas) -> BuildRecord:
    """The record of a build for this target and BLAS."""
    cuda = target.cuda
    return BuildRecord(
        engine=ENGINE_VERSION,
        edits=digest(edits_for(target), setup_script().encode())[:16],
        torch=target.torch,
        abi=target.abi,
        platform=target.platform,
        device=target.device,
        cuda=f"{cuda.version[0]}.{cuda.version[1]} for {cuda.archs}" if cuda else "",
        blas=f"{blas.name} {blas.version}",
    )


def setup_script() -> str:
    """Text of the setup.py that takes the place of upstream's."""
    return resources.files("spark_me.engine").joinpath("resources", "setup.py").read_text(encoding="utf-8")


def installed_record() -> BuildRecord | None:
    """The record of the installed engine; None if there is none, or if this spark_me did not build it."""
    try:
        distribution = importlib.metadata.distribution(ENGINE_NAME)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(f"{ENGINE_NAME}/{RECORD_NAME}")))
    if not path.is_file():
        return None
    try:
        return BuildRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):  # cut short, or written by a spark_me with other fields
        return None


_STEP = re.compile(r"^\s*\[(\d+)/(\d+)\] ")
_SOURCE = re.compile(r"([\w.-]+\.(?:cpp|cu|cc))\b")
_BAR = 24


@dataclass(frozen=True)
class Step:
    """One finished step of a build: `done` of `total`, and the source file it compiled ("" if it names none)."""

    done: int
    total: int
    name: str


def parse_step(line: str) -> Step | None:
    """The step that a line of ninja's output reports, None if it reports none."""
    match = _STEP.match(line)
    if match is None:
        return None
    sources = _SOURCE.findall(line)
    return Step(int(match[1]), int(match[2]), sources[-1] if sources else "")


class Progress:
    """Draws a build's steps on `stream`: redrawn in place on a terminal, else one plain line a step.

    Args:
        label: what is being built.
        stream: where to draw.
        clock: seconds, for the elapsed time.
    """

    def __init__(self, label: str, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._label = label
        self._stream = stream
        self._clock = clock
        self._start = clock()
        self._terminal = stream.isatty()
        self._step = Step(0, 0, "")

    def read(self, line: str) -> None:
        """Take in one line of the build's output."""
        step = parse_step(line)
        if step is None:
            return
        self._step = step
        if not self._terminal:
            name = f"  {step.name}" if step.name else ""
            self._write(f"{self._label}: {step.done}/{step.total}  {self._elapsed()}{name}\n")

    def tick(self) -> None:
        """Redraw, so that the elapsed time moves while a long file compiles."""
        if not self._terminal:
            return
        done, total = self._step.done, self._step.total
        filled = _BAR * done // total if total else 0
        count = f"{done}/{total} files" if total else "preparing"
        self._write(f"\r{self._label} [{'#' * filled}{'.' * (_BAR - filled)}] {count}  {self._elapsed()}  \b\b")

    def close(self) -> None:
        """Leave the drawn line behind."""
        if self._terminal:
            self.tick()
            self._write("\n")

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(self._clock() - self._start), 60)
        return f"{minutes}:{seconds:02d}"

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


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
