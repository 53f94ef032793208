"""A whole training step as one CUDA graph: the host launches it at once, where it launched thousands of kernels.

A graph repeats what was captured, with the numbers that it finds in the same memory. So what differs from step to step
has to lie there (images, masks, learning rate, weight decay; random numbers follow the seed), and whatever else the
host decided stays as it was. That nothing else differs is proven by the tests for our own code; in a run it is tried
once more before the graph is used, on a batch, rates and a seed that it was not captured with.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spark_me.errors import first_line
from spark_me.train.checkpoint import TrainState
from spark_me.train.step import Inputs

WARM_UP = 3
"""Steps before a capture: kernels are compiled and chosen, the optimizer makes its averages."""
TOLERANCE = 0.05
"""How far the change that a trial makes may be from that of the same step without a graph, as a share of it. Atomics
of cuDNN differ from time to time by far less, and a graph that reads an old batch by far more."""
SAME_LOSS = 1e-2
"""The same for loss and norm of the gradient."""

Compute = Callable[[Sequence[Inputs], float], Tensor]
"""From micro-batches and the number of targets of all processes, a whole step: float64 [2], loss and norm."""
Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""From a computation, what it returned and what repeats it. It is not carried out by that itself."""

_log = logging.getLogger(__name__)


def capture_on_gpu(compute: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """Capture in a CUDA graph; see `Capture`."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as the one that pins the next images, may go on with what a capture would forbid.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        values = compute()
    return values, graph.replay


class GraphedSteps:
    """Takes steps: at first as they come; then one is captured, tried on another batch, and repeated from there on."""

    def __init__(self, compute: Compute, state: TrainState, capture: Capture = capture_on_gpu) -> None:
        """
        Args:
            compute: what a device does in a step. Its optimizer's rates are tensors (`build_optimizer`).
            state: all that a step changes.
            capture: as `capture_on_gpu`.
        """
        self.obstacle = ""
        """Why the steps are not captured after all."""
        self._compute = compute
        self._state = state
        self._capture = capture
        self._taken = 0
        self._replay: Callable[[], None] | None = None

    def take(self, inputs: Sequence[Inputs], targets: float) -> Tensor:
        """Take a step; return its loss and norm, float64 [2].

        Args:
            inputs: micro-batches. Where their shapes are not those of the captured step, it goes without the graph.
            targets: how many there are in those of all processes.
        """
        self._taken += 1
        if self._taken == WARM_UP:
            self._inputs = [Inputs(tuple(tensor.clone() for tensor in one.tensors), one.targets) for one in inputs]
            self._geometry = _geometry(inputs, targets)
        if self._taken <= WARM_UP or self.obstacle or _geometry(inputs, targets) != self._geometry:
            return self._compute(inputs, targets)
        if self._replay is None:
            try:
                self._record(inputs, targets)
            except (RuntimeError, GraphError) as error:
                self._give_up(first_line(error))
                return self._compute(inputs, targets)
        return self._repeat(inputs)

    def _record(self, inputs: Sequence[Inputs], targets: float) -> None:
        """Capture a step on the batch of an earlier one and try it on this one; leave all as it was.

        The trial is a step at other rates, without the graph and with it. Without comes first: its memory is free when
        the graph takes its own.

        Raises:
            RuntimeError: if it cannot be captured.
            GraphError: if the two differ.
        """
        tensors, rates, random = _changing(self._state), _rates(self._state), _random_state(inputs)
        before = [tensor.clone() for tensor in tensors]
        try:
            with _doubled(rates):
                values = self._compute(inputs, targets)
            without = [tensor.clone() for tensor in tensors]
            _restore(tensors, before, random)
            self._state.optimizer.zero_grad()
            self._values, self._replay = self._capture(lambda: self._compute(self._inputs, targets))
            with _doubled(rates):
                repeated = self._repeat(inputs)
            parameters = sum(1 for _ in self._state.model.parameters())
            buffers = parameters + sum(1 for _ in self._state.model.buffers())
            parts = slice(parameters), slice(parameters, buffers)
            off = max(_difference(tensors[part], without[part], before[part]) for part in parts)
        finally:
            _restore(tensors, before, random)
        off_values = ((repeated - values).abs() / values.abs()).max().item()
        if not (off <= TOLERANCE and off_values <= SAME_LOSS):
            raise GraphError(f"in a trial its step was off by {off:.2g}, its loss or gradient by {off_values:.2g}")

    def _repeat(self, inputs: Sequence[Inputs]) -> Tensor:
        assert self._replay is not None
        for static, one in zip(self._inputs, inputs):
            torch._foreach_copy_([*static.tensors], [*one.tensors])
        self._replay()
        return self._values.clone()  # the next step overwrites them

    def _give_up(self, reason: str) -> None:
        self.obstacle = reason
        self._replay = None  # with its memory
        self._state.optimizer.zero_grad()
        _log.warning("the run goes on without a CUDA graph (train.cuda_graph): %s", reason)


class GraphError(Exception):
    """A graph does not do what the step does."""


def _geometry(inputs: Sequence[Inputs], targets: float) -> Any:
    """What a captured step holds fast."""
    return targets, [([(x.shape, x.dtype) for x in one.tensors], one.targets) for one in inputs]


def _changing(state: TrainState) -> list[Tensor]:
    """All that a step changes: parameters, buffers, then the optimizer's averages and counts of steps."""
    averages = [value for each in state.optimizer.state.values() for value in each.values()]
    counts = [group.get("step") for group in state.optimizer.param_groups]
    of_optimizer = [value for value in averages + counts if isinstance(value, Tensor)]
    return [*(each.detach() for each in state.model.parameters()), *state.model.buffers(), *of_optimizer]


def _rates(state: TrainState) -> list[Tensor]:
    values = [group[key] for group in state.optimizer.param_groups for key in ("lr", "weight_decay")]
    return [value for value in values if isinstance(value, Tensor)]


@contextmanager
def _doubled(rates: list[Tensor]) -> Iterator[None]:
    torch._foreach_mul_(rates, 2)
    try:
        yield
    finally:
        torch._foreach_div_(rates, 2)


def _random_state(inputs: Sequence[Inputs]) -> tuple[Tensor, Tensor | None]:
    device = inputs[0].tensors[0].device
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor], random: tuple[Tensor, Tensor | None]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
    torch.set_rng_state(random[0])
    if random[1] is not None:
        torch.cuda.set_rng_state(random[1], tensors[0].device)


def _difference(actual: Sequence[Tensor], expected: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Of two changes of the same tensors, as a share of the expected one; NaN is passed on."""
    off = change = 0.0
    for ours, theirs, old in zip(actual, expected, before, strict=True):
        if ours.is_floating_point():
            off += (ours - theirs).double().square().sum().item()
            change += (theirs - old).double().square().sum().item()
    return (off / change) ** 0.5 if change or off else 0.0
