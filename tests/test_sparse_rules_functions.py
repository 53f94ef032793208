"""Every rule of a function has its gather reference (`rule_references`)."""

import operator

import pytest
import timm.layers
import torch
import torchvision
from rule_references import CHANNELS, PATCH, VISIBLE, Between, C, Operation, compare, of_images_alone
from torch import nn
from torch.nn import functional as F

from spark_me import sparse
from spark_me.encoder import sparsify
from spark_me.sparse.rules import functions
from spark_me.trace import trace


def shuffle(self, x):
    images, channels, height, width = x.size()
    x = x.view(images, 2, channels // 2, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(images, -1, height, width)


def selective(self, x):
    """Selective kernels: two branches, weighed by a softmax over them for each image and channel."""
    both = torch.stack([x, self.layers[0](x)], dim=1)
    gate = self.layers[1](both.sum(1).mean((2, 3), keepdim=True)).view(x.shape[0], 2, CHANNELS, 1, 1)
    return (both * gate.softmax(dim=1)).sum(dim=1)


def last_axis(self, x):
    x = x.permute(0, 2, 3, 1)
    x = self.layers[1](F.gelu(self.layers[0](x)))
    return F.layer_norm(x, (CHANNELS,)).movedim(3, 1)


def spatial_gate(self, x):
    """As CBAM's, without its convolution."""
    both = torch.cat([x.mean(1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
    return x * self.layers[0](both).sigmoid()


def bilinear(self, x, parts=None):
    one, two, three = x.split([2, 2, 2], dim=1) if parts is None else parts
    return torch.cat((one * two, three, torch.addcmul(one, two, three, value=0.5)), dim=1)


def conv1x1(inputs=CHANNELS, outputs=CHANNELS):
    return nn.Conv2d(inputs, outputs, 1)


FUNCTIONS = {
    "mean": lambda self, x: x * x.mean((2, 3), keepdim=True),
    "mean by a gate of one channel": lambda self, x: x + x[:, 2:3] * x.mean((2, 3), keepdim=True),
    "mean of flattened": lambda self, x: x - x.flatten(2).mean(2)[:, :, None, None],
    "sum": lambda self, x: x / (torch.sum(x, dim=(2, 3), keepdim=True).abs() + 1),
    "amax": lambda self, x: x - x.amax((2, 3), keepdim=True),
    "var": lambda self, x: x / (x.var(dim=(2, 3), keepdim=True) + 1).sqrt(),
    "std": lambda self, x: x / (x.std((2, 3), keepdim=True) + 1),
    "norm": lambda self, x: x / x.norm(p=2, dim=(2, 3), keepdim=True),
    "vector norm": lambda self, x: x / torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True),
    "adaptive_avg_pool2d": lambda self, x: x * F.adaptive_avg_pool2d(x, 1).sigmoid(),
    "adaptive_max_pool2d": lambda self, x: x * F.adaptive_max_pool2d(x, (1, 1)).tanh(),
    "linear of the mean": Operation(
        lambda self, x: x * self.layers[0](x.mean((2, 3)))[:, :, None, None].sigmoid(), nn.Linear(C, C)
    ),
    "squeeze and excitation": lambda: torchvision.ops.SqueezeExcitation(C, 4),
    "squeeze and excitation, hard": lambda: torchvision.ops.SqueezeExcitation(C, 4, scale_activation=nn.Hardsigmoid),
    "channel attention by a convolution over channels": lambda: timm.layers.EcaModule(C),
    "expand_as": Operation(
        lambda self, x: x * self.layers[0](F.adaptive_avg_pool2d(x, 1)).sigmoid().expand_as(x), conv1x1()
    ),
    "spread": Operation(lambda self, x: self.layers[0](x) + x.mean((2, 3), keepdim=True).expand_as(x), conv1x1()),
    "parameters": Operation(
        lambda self, x: self.one * x * self.two + x / 2 - self.constant * 3 + 1, one=(C, 1, 1), two=(1, C, 1, 1)
    ),
    "one factor": Operation(lambda self, x: x * self.one, one=(1,)),
    "values of images and parameters": Operation(
        lambda self, x: (x - x.mean((2, 3), keepdim=True) * self.one) * (x.mean((2, 3), keepdim=True) + 2),
        one=(C, 1, 1),
    ),
    "cat": lambda self, x: torch.cat([x, x.sigmoid()], 1)[:, 3:9],
    "chunk": lambda self, x: bilinear(self, x, x.chunk(3, dim=1)),
    "split": lambda self, x: torch.cat([torch.split(x, 4, dim=1)[1], x.tensor_split(2, dim=1)[0] ** 2, x[:, 5:]], 1),
    "split with sizes": bilinear,
    "stack": lambda self, x: torch.stack([x, x.tanh()], 2).flatten(1, 2)[:, 1::2],
    "unbind": lambda self, x: torch.stack([x.unbind(1)[k] * k for k in range(C)], dim=1),
    "squeeze": lambda self, x: (
        x.flatten(2).unsqueeze(1).squeeze(1).unflatten(2, (x.shape[2], x.shape[3])).unflatten(1, (2, 3)).flatten(1, 2)
    ),
    "one channel": lambda self, x: torch.cat([x[:, 1:], (x[:, 0] * 2 + x[:, 1].tanh()).unsqueeze(1)], dim=1),
    "selective kernels": Operation(selective, conv1x1(), conv1x1(C, 2 * C)),
    "getitem": lambda self, x: torch.cat([x[:, ::2], x[:, 1:3], x[:, [0][0] : 1, ...]], 1),
    "channel shuffle": shuffle,
    "reshape": lambda self, x: (
        x - x.reshape(x.shape[0], 3, 2, -1).flatten(1, 2).mean(2)[:, :, None, None] + x.view(x.shape).view_as(x)
    ),
    "channels last": Operation(last_axis, nn.Linear(C, 4), nn.Linear(4, C)),
    "channels last by functions": Operation(
        lambda self, x: F.linear(x.permute(0, 2, 3, 1), self.one + self.constant.view(-1), self.two).movedim(3, 1),
        one=(C, C), two=(C,),
    ),
    "mean over channels": lambda self, x: x - x.mean(dim=1, keepdim=True),
    "softmax over channels": lambda self, x: x * x.softmax(dim=1),
    "logsumexp over channels": lambda self, x: x - torch.logsumexp(x, 1, keepdim=True),
    "norm over channels": lambda self, x: x / x.norm(dim=1, keepdim=True),
    "gate over channels": Operation(spatial_gate, conv1x1(2, 1)),
    "conv2d by parameters": Operation(lambda self, x: F.conv2d(x, self.one, self.two), one=(C, C, 1, 1), two=(C,)),
    "shapes": lambda self, x: x * x.size(1) + x.shape[1] / x.dim() + x.ndim,
    "dtypes": lambda self, x: x.to(x.dtype) + torch.ones(1, dtype=x.dtype, device=x.device),
}  # fmt: skip
POINTWISE = {
    "add": lambda self, x: torch.add(x, x.sigmoid(), alpha=2) + x.add(1).add_(x).sub(2).sub_(x * 2).subtract(1),
    "operators": lambda self, x: -(2 - x) / 3 + 2 * x - x / (x.abs() + 1) + abs(x) ** 2,
    "in place": lambda self, x: operator.itruediv(operator.imul(operator.isub(operator.iadd(x * 1, 2), 1), 3), 2),
    "products": lambda self, x: torch.mul(x, x).multiply(2).mul_(x).div(3).div_(2).true_divide(2).divide(2),
    "powers": lambda self, x: x.square().add(1).sqrt() + x.abs().add(1).rsqrt().pow(2) + (x / 99).exp() + x.abs().log(),
    "others": lambda self, x: x.neg().reciprocal() + torch.maximum(x, -x) - torch.minimum(x, x * 2) + torch.erf(x),
    "clamp": lambda self, x: x.clamp(-1, 1) + x.clip(min=0) + torch.clamp(x, max=0.5) + (x * 1).clamp_(0, 2),
    "several": lambda self, x: (
        torch.lerp(x, x.square(), 0.3) + torch.addcmul(x, x, x.tanh(), value=2) + torch.rsub(x, 2)
    ),
    "relus": lambda self, x: (
        F.relu(x) + F.relu6(x) + F.leaky_relu(x, 0.2) + torch.relu_(x * 2) + F.leaky_relu_(x * 2) + F.threshold(x, 1, 2)
    ),
    "elus": lambda self, x: (
        F.elu(x) + F.elu_(x * 2) + F.selu(x) + F.celu(x) + F.gelu(x, approximate="tanh") + F.silu(x)
    ),
    "sigmoids": lambda self, x: (
        torch.sigmoid(x) + (x * 2).sigmoid_() + torch.tanh(x) + (x * 2).tanh_() + F.hardsigmoid(x) + F.hardswish(x)
    ),
    "over_channels_by_place": lambda self, x: (
        x.norm(2, 1, True) * x + x.mean(1, True) * x.norm(p=2, dim=1, keepdim=True)
    ),
    "softs": lambda self, x: (
        F.mish(x) + F.softplus(x) + F.softsign(x) + F.hardtanh(x) + F.hardtanh_(x * 2) + F.logsigmoid(x)
    ),
    "casts": lambda self, x: x.type_as(x).clone().contiguous() * F.dropout(x, 0.0, self.training),
}
NOT_CALLED = {
    "alias", "detach_copy", "float", "where", "narrow", "boolean_dispatch", "avg_pool2d", "max_pool2d",
    "reshape_as", "ndimension", "concat", "concatenate", "swapaxes", "moveaxis", "vector_norm", "split_with_sizes",
    "iadd", "isub", "imul", "itruediv", "threshold", "logsigmoid", "div_",
}  # fmt: skip


def operation_of(made):
    """Cases are functions, or make a module."""
    if isinstance(made, nn.Module):
        return made
    return made() if made.__code__.co_argcount == 0 else Operation(made)


@pytest.mark.parametrize("case", [*FUNCTIONS.items(), *POINTWISE.items()], ids=lambda case: case[0])
def test_functions(case, assert_close):
    compare(Between(operation_of(case[1])), of_images_alone, assert_close)


def test_functional_dropout_follows_the_encoders_mode():
    encoder = sparsify(Between(Operation(lambda self, x: F.dropout(x, 0.9, self.training))))
    pyramid = sparse.Pyramid(torch.ones(2, 2, 3, dtype=torch.bool), encoder.total_stride, "native")
    images = sparse.to_sparse(torch.randn(2, 3, *(side * encoder.total_stride for side in (2, 3))), pyramid)
    first, second = (encoder.train()(images)[-1].F for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (encoder.eval()(images)[-1].F for _ in range(2))
    assert torch.equal(first, second)


def test_half_precision_is_kept():
    encoder = sparsify(Between(torchvision.ops.SqueezeExcitation(C, 4)))
    kinds = []
    encoder.head.register_forward_pre_hook(lambda layer, inputs: kinds.append(inputs[0].F.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoder(sparse.to_sparse(torch.randn(3, 3, 16, 24), sparse.Pyramid(VISIBLE, PATCH, "native")))
    assert kinds == [torch.bfloat16]


def test_every_rule_has_a_case_here():
    called = set()
    for made in [*FUNCTIONS.values(), *POINTWISE.values()]:
        for node in trace(Between(operation_of(made)).double()).nodes:
            called.add(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    assert functions.FUNCTIONS.keys() - called - NOT_CALLED == set()
