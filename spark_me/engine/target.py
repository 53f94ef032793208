"""What a build is for: the Python, torch and machine at hand, and a CPU or a CUDA device."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from spark_me.errors import EngineError

_DEFAULT_CUDA_HOME = "/usr/local/cuda"


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit and the GPU architectures to compile for.

    Attributes:
        home: folder that holds bin/nvcc and include/.
        version: nvcc's (major, minor).
        archs: architectures as torch writes them, such as "9.0" or "8.0;9.0".
    """

    home: Path
    version: tuple[int, int]
    archs: str


@dataclass(frozen=True)
class Target:
    """Everything about the environment that decides whether a built engine fits.

    Attributes:
        python: (major, minor).
        abi: tag of Python's extension modules, such as "cpython-311-x86_64-linux-gnu".
        platform: such as "linux-x86_64".
        torch: torch's full version, with its local part ("2.11.0+cu130").
        cuda: the toolkit, None for a CPU build.
    """

    python: tuple[int, int]
    abi: str
    platform: str
    torch: str
    cuda: Cuda | None

    @property
    def device(self) -> str:
        """Either "cpu" or "cuda"."""
        return "cpu" if self.cuda is None else "cuda"


def find_target(device: str | None = None) -> Target:
    """The target of a build in this environment.

    Args:
        device: "cpu" or "cuda" to force one; None takes CUDA where torch sees a GPU and nvcc is there.

    Raises:
        EngineError: if CUDA is asked for, or would be chosen, and cannot be built for.
    """
    return Target(
        python=sys.version_info[:2],
        abi=str(sysconfig.get_config_var("SOABI")),
        platform=sysconfig.get_platform(),
        torch=torch.__version__,
        cuda=_choose_cuda(device),
    )


def _choose_cuda(device: str | None) -> Cuda | None:
    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        return None
    if torch.version.cuda is None:
        raise EngineError(
            f"torch {torch.__version__} is built without CUDA, so the engine cannot be either: "
            "install a CUDA build of torch, or use --cpu"
        )
    home = find_cuda_home()
    if home is None:
        if device is None:
            print(
                "torch sees a GPU, but there is no nvcc: building for the CPU. For the GPU, install the CUDA toolkit "
                f"{torch.version.cuda}, put nvcc on PATH or set CUDA_HOME, and run `spark-me engine install` again"
            )
            return None
        raise EngineError(
            f"--cuda needs nvcc: install the CUDA toolkit {torch.version.cuda} (the version torch was built with) and "
            "put nvcc on PATH or set CUDA_HOME"
        )
    version = nvcc_version(home)
    if version[0] != int(torch.version.cuda.split(".")[0]):
        raise EngineError(
            f"nvcc in {home} is {version[0]}.{version[1]}, but torch was built with CUDA {torch.version.cuda}: "
            f"install the CUDA toolkit {torch.version.cuda} and set CUDA_HOME to it, or use --cpu"
        )
    return Cuda(home, version, _cuda_archs())


def find_cuda_home() -> Path | None:
    """The first complete CUDA toolkit of $CUDA_HOME, $CUDA_PATH, nvcc on PATH, /usr/local/cuda."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates += [str(Path(nvcc).parent.parent)] if nvcc else []
    candidates += [_DEFAULT_CUDA_HOME]
    for candidate in candidates:
        # An nvcc on PATH may be a wrapper that lies apart from its toolkit: the headers tell.
        if candidate and all(Path(candidate, part).is_file() for part in ("bin/nvcc", "include/cuda_runtime.h")):
            return Path(candidate)
    return None


def nvcc_version(home: Path) -> tuple[int, int]:
    """(major, minor) that nvcc reports."""
    try:
        output = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise EngineError(
            f"{home}/bin/nvcc does not run ({error}): reinstall the CUDA toolkit, or use --cpu"
        ) from error
    match = re.search(r"release (\d+)\.(\d+)", output)
    if match is None:
        raise EngineError(f"{home}/bin/nvcc does not tell its version: reinstall the CUDA toolkit, or use --cpu")
    return int(match[1]), int(match[2])


def _cuda_archs() -> str:
    if archs := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return archs
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    if not found:
        raise EngineError(
            "--cuda without a GPU in this machine: say which to compile for, for example TORCH_CUDA_ARCH_LIST=9.0"
        )
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found))
