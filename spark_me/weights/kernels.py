"""Convolution weights between MinkowskiEngine's layout and torch's; needs torch alone.

MinkowskiEngine numbers kernel offsets with the first spatial axis fastest. With coordinates (image, y, x) that axis
is y, so a kernel [K, Cin, Cout] reads as [kw, kh, Cin, Cout]. A symmetric kernel would hide the mistake. Its bias is
[1, Cout].
"""

from collections.abc import Mapping

from torch import Tensor, nn


def kernel_to_weight(kernel: Tensor, kernel_size: int) -> Tensor:
    """MinkowskiEngine's kernel to torch's weight [Cout, Cin, k, k].

    Args:
        kernel: [K, Cin, Cout]; [Cin, Cout] of a 1×1 convolution of stride 1; [K, C] of a depthwise one, whose weight is
            [C, 1, k, k].
        kernel_size: k.
    """
    return kernel.reshape(kernel_size, kernel_size, -1, kernel.shape[-1]).permute(3, 2, 1, 0).contiguous()


def weight_to_kernel(weight: Tensor, kernel_shape: tuple[int, ...]) -> Tensor:
    """Inverse of `kernel_to_weight`.

    Args:
        weight: [Cout, Cin, k, k]; [C, 1, k, k] of a depthwise convolution.
        kernel_shape: the shape that the layer's `kernel` has: its rank depends on the layer.
    """
    return weight.permute(3, 2, 1, 0).reshape(kernel_shape).contiguous()


def to_dense_state(state: Mapping[str, Tensor], dense: nn.Module) -> dict[str, Tensor]:
    """Bring a sparse model's state dict to the layout of its dense twin, whose module types drive the conversion.

    Args:
        state: tensors named as in the sparse model; a convolution's are `….kernel` and `….bias`.
        dense: a module with the same names, `….weight` for its convolutions.

    Returns:
        A state dict for `dense`; tensors that need no conversion are shared.
    """
    converted = dict(state)
    for name, module in dense.named_modules():
        kernel = converted.pop(f"{name}.kernel", None) if isinstance(module, nn.Conv2d) else None
        if kernel is not None:
            converted[f"{name}.weight"] = kernel_to_weight(kernel, module.kernel_size[0])
            if f"{name}.bias" in converted:
                converted[f"{name}.bias"] = converted[f"{name}.bias"].flatten()
    return converted
