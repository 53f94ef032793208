"""Devices: one by name, copies that nobody waits for, and which numbers products are computed in."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from spark_me.errors import UserError, first_line


def device_name(name: str) -> str:
    """A device's name; auto takes CUDA where there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def pick_device(name: str, option: str = "--device ", advice: str = "use auto or cpu") -> torch.device:
    """A device by name, with its number; auto takes CUDA where there is one.

    Args:
        name: auto, or as torch calls it.
        option, advice: what names it, and what to do if it is not usable, for messages.

    Raises:
        UserError: if it is not usable here.
    """
    name = device_name(name)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{option}{name}: not usable here ({first_line(error)}): {advice}") from None


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`: itself if it is there already, else a copy.

    From the CPU to a GPU the copy goes through pinned memory: the host does not wait, and what is computed on the GPU
    afterwards comes after it. The other way the host waits for all work on the GPU.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Readback:
    """Values on their way from a device to the host."""

    def __init__(self, values: Tensor) -> None:
        """
        Args:
            values: [N], on any device. Their copy is under way when this returns; the host has not waited for it.
        """
        self._values = values.to("cpu", non_blocking=True)  # from a GPU, into pinned memory
        self._done = None
        if values.is_cuda:
            self._done = torch.cuda.Event()
            self._done.record()

    def read(self) -> list[float]:
        """The values. The host waits for what they are computed from, but for nothing that was asked for later."""
        if self._done is not None:
            self._done.synchronize()
        return self._values.tolist()


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has products of bfloat16 for oneDNN: those with AVX-512 or AMX do."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Within, float32 products on a GPU take TF32, or are float32's own."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
