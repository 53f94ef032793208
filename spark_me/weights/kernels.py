"""Convolution weights between MinkowskiEngine's layout, in which FCMAE's checkpoints are, and torch's.

MinkowskiEngine numbers kernel offsets with the first spatial axis fastest. With coordinates (image, y, x) that axis
is y, so a kernel [K, Cin, Cout] reads as [kw, kh, Cin, Cout]. A symmetric kernel would hide the mistake. Its bias is
[1, Cout].
"""

from torch import Tensor


def kernel_to_weight(kernel: Tensor, kernel_size: int) -> Tensor:
    """MinkowskiEngine's kernel to torch's weight [Cout, Cin/groups, k, k]: both keep a group's outputs together.

    Args:
        kernel: [K, Cin/groups, Cout]; [Cin/groups, Cout] of a 1×1 convolution of stride 1; [K, C] of a depthwise one,
            whose weight is [C, 1, k, k].
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
