"""The machine at hand: a figure without its machine and versions says nothing."""

import datetime
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

import spark_me
from spark_me.engine import ENGINE_NAME, installed_version

_CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class Machine:
    """Date, versions and hardware."""

    date: str
    """Local time with its offset, ISO 8601."""
    versions: dict[str, str]
    processor: str
    threads: int
    """Of torch, on the CPU."""
    gpu: str | None
    """The GPU measured on; None on the CPU."""
    tf32: dict[str, bool] | None
    """Where a GPU may take TF32 for float32: torch's settings for convolution and for matmul."""


def describe_machine(device: str) -> Machine:
    """The machine at hand; `device` is "cpu" or "cuda"."""
    versions = {"spark_me": spark_me.__version__, "torch": torch.__version__}
    versions |= {name: installed_version(name) or "not installed" for name in ("torchvision", ENGINE_NAME)}
    on_gpu = device == "cuda"
    return Machine(
        date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        versions=versions | {"Python": platform.python_version()},
        processor=_processor(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if on_gpu else None,
        tf32=_tf32() if on_gpu else None,
    )


def _tf32() -> dict[str, bool]:
    return {"convolution": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32}


def _processor() -> str:
    """The processor's name as Linux knows it, else the little that Python knows."""
    if _CPU_INFO.is_file():
        for line in _CPU_INFO.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
