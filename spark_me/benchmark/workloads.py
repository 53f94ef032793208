"""One backend at work: its model, and a pass from images and mask to the gradients of all parameters."""

import difflib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import spark_me
from spark_me import sparse
from spark_me.benchmark.case import Case
from spark_me.benchmark.twins import DenseSparK, MaskedDenseSparK, dense_encoder, headless, masked_encoder
from spark_me.encoder import sparsify
from spark_me.errors import UserError
from spark_me.networks import dense_network

BACKENDS = (*sparse.BACKENDS, "masked_dense", "dense")
"""The sparse ones, their dense simulation, and the dense network without any mask."""
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Loss = Callable[[Tensor, Tensor], Tensor]
"""(images, visible) → scalar."""


class Variant(NamedTuple):
    """A backend, and how a dense one runs."""

    backend: str
    memory_format: str | None
    """A key of `MEMORY_FORMATS`; None for the sparse backends, whose rows know no other order."""
    compiled: bool = False
    """By `torch.compile`."""

    def __str__(self) -> str:
        manner = ", ".join([self.memory_format or "", *["compiled"] * self.compiled])
        return f"{self.backend} ({manner})" if manner else self.backend


def variants_of(backends: Sequence[str], *, compiled: bool = False) -> list[Variant]:
    """What has to run: the dense backends in every manner that may be the fastest one.

    Args:
        backends: of `BACKENDS`.
        compiled: whether they run compiled too, in the memory format that suits compilers.

    Raises:
        UserError: for an unknown backend, or none.
    """
    if not backends:
        raise UserError(f"--backends: give at least one of {', '.join(BACKENDS)}")
    variants = []
    for backend in dict.fromkeys(backends):
        if backend not in BACKENDS:
            close = difflib.get_close_matches(backend, BACKENDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose among {', '.join(BACKENDS)}"
            raise UserError(f"unknown backend {backend!r}: {hint}")
        if backend in sparse.BACKENDS:
            variants.append(Variant(backend, None))
        else:
            variants += [Variant(backend, memory_format) for memory_format in MEMORY_FORMATS]
            variants += [Variant(backend, "channels_last", compiled=True)] * compiled
    return variants


class Workload:
    """A model with random weights and its loss.

    Attributes:
        model: what is trained.
    """

    def __init__(self, case: Case, scope: str, variant: Variant) -> None:
        self._case = case
        # the sparse backends build their pyramid from a mask on the CPU, as training does
        self._mask_device = "cpu" if variant.backend in sparse.BACKENDS else case.device
        self._memory_format = MEMORY_FORMATS[variant.memory_format or "contiguous"]
        self.model, self._loss = _BUILDERS[scope](case, variant.backend)
        _start_norms_at_one(self.model)
        self.model.to(case.device).to(memory_format=self._memory_format)  # type: ignore[call-overload]
        if variant.compiled:
            self.model.compile(dynamic=False)
        self._inputs = self.inputs(case)

    def inputs(self, case: Case) -> tuple[Tensor, Tensor]:
        """The case's images, in this backend's memory format, and mask."""
        images, visible = case.draw()
        return images.contiguous(memory_format=self._memory_format), visible.to(self._mask_device)

    def run(self, inputs: tuple[Tensor, Tensor] | None = None) -> None:
        """One forward and backward pass, of this workload's own inputs when None, finished when it returns."""
        with self._case.computing():
            with self._case.autocast():
                loss = self._loss(*(inputs or self._inputs))
            loss.backward()
        if self._case.device == "cuda":
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Forget the gradients."""
        self.model.zero_grad(set_to_none=True)


def _build_encoder(case: Case, backend: str) -> tuple[nn.Module, Loss]:
    """An encoder; its loss is the sum of the means of the four feature scales."""
    if backend == "dense":
        model = dense_encoder(case.encoder)
        return model, lambda images, visible: _sum_of_means(model(images))
    if backend == "masked_dense":
        model = masked_encoder(case.encoder)
        return model, lambda images, visible: _sum_of_means(model(images, visible))
    model = sparsify(dense_network(case.encoder))

    def loss(images: Tensor, visible: Tensor) -> Tensor:
        # a new mask in every step of training: its pyramid and tables belong to the pass
        pyramid = sparse.Pyramid(visible, case.patch_size, backend, images.device)
        return _sum_of_means([x.F for x in model(sparse.to_sparse(images, pyramid))])

    return model, loss


def _build_step(case: Case, backend: str) -> tuple[nn.Module, Loss]:
    if backend == "dense":
        model: nn.Module = DenseSparK(case.encoder, case.decoder_width)
    elif backend == "masked_dense":
        model = MaskedDenseSparK(headless(case.encoder), decoder_width=case.decoder_width)
    else:
        model = spark_me.build_model(
            case.encoder,
            image_size=case.image_size,
            mask_ratio=case.mask_ratio,
            decoder_width=case.decoder_width,
            drop_path=0.0,
            backend=backend,
        )
    return model, model


_BUILDERS: dict[str, Callable[[Case, str], tuple[nn.Module, Loss]]] = {"encoder": _build_encoder, "step": _build_step}


def _sum_of_means(features: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.mean(dtype=torch.float32) for x in features]).sum()


def _start_norms_at_one(model: nn.Module) -> None:
    """Encoders may start a block's last norm at zero; multiplying by zeros could cost less than training does."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("weight"):
            nn.init.ones_(parameter)
