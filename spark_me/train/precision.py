"""Which device a run computes on, and in which numbers."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from spark_me.devices import float32_products
from spark_me.errors import UserError
from spark_me.train import distributed
from spark_me.train.failures import first_line

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

SMALLEST_SCALE = 1e-4
"""Of fp16's loss: below it no gradient is left to save, the run diverges."""


class Precision:
    """`train.precision` on a device."""

    def __init__(self, name: str, device: torch.device) -> None:
        """
        Raises:
            UserError: if the device cannot compute so.
        """
        if name == "tf32" and device.type != "cuda":
            raise UserError(f"train.precision=tf32 needs a CUDA GPU, not {device}: use fp32 or bf16")
        self.name = name
        self.device = device
        self.autocast = torch.autocast(device.type, AUTOCAST.get(name, torch.bfloat16), enabled=name in AUTOCAST)
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def products(self) -> AbstractContextManager:
        """Within, float32 products on a GPU take TF32 for tf32, and are float32's own for fp32."""
        return float32_products(tf32=self.name == "tf32") if self.device.type == "cuda" else nullcontext()


def pick_device(name: str) -> torch.device:
    """The device of this process for `run.device`: of several processes on a machine, each takes its own GPU.

    Raises:
        UserError: if there is no such device, or fewer GPUs than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.world_size() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.empty(0, device=name).device  # "cuda" has no number, which set_device asks for
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"run.device={name}: not usable here ({first_line(error)}): use run.device=auto or cpu, "
            "and no more processes on a machine than it has GPUs"
        ) from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
