"""What a CUDA graph does, on the CPU: a computation is recorded once, and repeated with what lies in the same memory.

Whatever the host decided stays as it was, and what it reads back is refused, as by a capture.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spark_me.train.checkpoint import TrainState
from spark_me.train.cuda_graph import _changing

READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"}
"""Operations whose results, or their shapes, the host waits for."""


class Recorder(TorchDispatchMode):
    """Records every operation that is not a view of what is there already."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name.removeprefix("aten::") in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **kwargs)
        aliases = [each.alias_info for each in func._schema.returns]
        if not aliases or any(each is None or each.is_write for each in aliases):
            self.calls.append((func, args, kwargs, tree_leaves(out)))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        """Carry all out again, into the memory of the first time."""
        for func, args, kwargs, places in self.calls:
            for place, value in zip(places, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(place, Tensor) and place is not value:
                    place.copy_(value)


def recording(state: TrainState) -> Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]:
    """A `Capture` that leaves all that a step changes as it was."""

    def capture(compute: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        tensors, random = _changing(state), torch.get_rng_state()
        before = [tensor.clone() for tensor in tensors]
        recorder = Recorder()
        try:
            with recorder:
                values = compute()
        finally:
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
            torch.set_rng_state(random)
        return values, recorder.replay

    return capture
