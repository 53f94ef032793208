"""Weights of encoders of one's own, which no table knows: their own names and nothing else."""

from collections.abc import Mapping

from torch import Tensor, nn

from spark_me.weights.kernels import kernel_to_weight
from spark_me.weights.strict import check_tensors


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of an encoder as dense layers of the same names hold them: `kernel` becomes `weight`, OIHW.

    Args:
        model: an encoder, or a SparK model, whose encoder counts.
    """
    from spark_me import sparse
    from spark_me.spark import SparK

    encoder: nn.Module = model.encoder if isinstance(model, SparK) else model
    state = dict(encoder.state_dict())
    for name, layer in encoder.named_modules():
        if isinstance(layer, sparse.Conv2d | sparse.DepthwiseConv2d):
            state[f"{name}.weight"] = kernel_to_weight(state.pop(f"{name}.kernel"), layer.kernel_size)
            if layer.bias is not None:
                state[f"{name}.bias"] = state[f"{name}.bias"].flatten()
    return state


def load_same(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict of the model's own names, all of it or nothing.

    Raises:
        WeightsError: for missing or unexpected keys, and for other shapes.
    """
    check_tensors(
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        f"{where}: does not fit the model, whose encoder is none of spark_me's own: only its own names load",
    )
    model.load_state_dict(state)
