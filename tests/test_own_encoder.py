"""The exactness contract for an encoder of one's own, made of layers that no published encoder here uses."""

from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import contract_masks, randomise
from torch import nn
from torch.nn import functional

from spark_me import sparse
from spark_me.encoders.base import SparseEncoder
from spark_me.spark import SparK
from spark_me.weights.kernels import to_dense_state

SPARSE = SimpleNamespace(**{name: getattr(sparse, name) for name in sparse.__all__})
DENSE = SimpleNamespace(
    Conv2d=lambda c_in, c_out, k, stride=1, groups=1, dilation=1, bias=False: nn.Conv2d(
        c_in, c_out, k, stride, dilation * (k // 2), dilation, groups, bias
    ),
    MaxPool2d=lambda k, stride: nn.MaxPool2d(k, stride, k // 2),
    AvgPool2d=nn.AvgPool2d,
    GroupNorm=nn.GroupNorm,
    InstanceNorm2d=nn.InstanceNorm2d,
    SqueezeExcite=torchvision.ops.SqueezeExcitation,
    LeakyReLU=nn.LeakyReLU,
    SiLU=nn.SiLU,
    Hardswish=nn.Hardswish,
    add=torch.add,
)


class Residual(nn.Module):
    def __init__(self, body, add):
        super().__init__()
        self.body, self.add = body, add

    def forward(self, x):
        return self.add(x, self.body(x))


def stage(layers, c_in, c_out, stride):
    body = nn.Sequential(
        layers.Conv2d(c_out, c_out, 3, groups=4, dilation=2),
        layers.InstanceNorm2d(c_out, affine=True),
        layers.Hardswish(),
        layers.SqueezeExcite(c_out, 4, scale_activation=nn.Hardsigmoid),
        layers.Conv2d(c_out, c_out, 1, groups=2, bias=True),
    )
    return nn.Sequential(
        layers.Conv2d(c_in, c_out, 3, stride, groups=2),
        layers.GroupNorm(4, c_out),
        layers.LeakyReLU(0.1),
        layers.MaxPool2d(3, 1),
        Residual(body, layers.add),
        layers.SiLU(),  # without it, densify's norm would remove the bias before it
    )


def stem(layers):
    return nn.Sequential(layers.Conv2d(3, 8, 7, stride=2, bias=True), layers.SiLU(), layers.AvgPool2d(2, 2))


class OwnEncoder(SparseEncoder):
    """Total stride 8 with two stages, 16 with three."""

    def __init__(self, stages, layers=SPARSE):
        super().__init__()
        self.strides = tuple(4 * 2**level for level in range(stages))
        self.channels = tuple(8 * 2**level for level in range(stages))
        self.total_stride = self.strides[-1]
        self.stem = stem(layers)
        widths = (8, *self.channels)
        self.stages = nn.ModuleList(
            stage(layers, *pair, stride=2 if level else 1) for level, pair in enumerate(zip(widths, widths[1:]))
        )

    def forward(self, x):
        x = self.stem(x)
        return [x := each(x) for each in self.stages]


def mask_of(x, visible):
    side = x.shape[2] // visible.shape[1]
    return visible.repeat_interleave(side, 1).repeat_interleave(side, 2)


def per_image(function, x, visible):
    """`function` of every image's visible sites alone, [C, n] → [C, n]; zero at the others."""
    out = torch.zeros_like(x)
    for image, mask in enumerate(mask_of(x, visible)):
        out[image, :, mask] = function(x[image][:, mask])
    return out


def standardise(sites, groups, layer):
    grouped = sites.reshape(groups, -1)
    variance, mean = torch.var_mean(grouped, dim=1, correction=0, keepdim=True)
    normalised = ((grouped - mean) / (variance + layer.eps).sqrt()).view_as(sites)
    return normalised * layer.weight[:, None] + layer.bias[:, None]


def simulate(layer, x, visible):
    """A dense layer of x [B, C, h, w] that is zero at hidden sites, computed as if these did not exist."""
    if isinstance(layer, nn.Sequential):
        for each in layer:
            x = simulate(each, x, visible)
        return x
    if isinstance(layer, Residual):
        return x + simulate(layer.body, x, visible)
    if isinstance(layer, nn.GroupNorm):
        return per_image(lambda sites: standardise(sites, layer.num_groups, layer), x, visible)
    if isinstance(layer, nn.InstanceNorm2d):
        return per_image(lambda sites: standardise(sites, len(sites), layer), x, visible)
    if isinstance(layer, torchvision.ops.SqueezeExcitation):
        return per_image(lambda sites: layer(sites[None, :, None])[0, :, 0], x, visible)
    mask = mask_of(x, visible)[:, None]
    if isinstance(layer, nn.AvgPool2d):
        x = layer(x) / layer(mask.to(x.dtype))
    elif isinstance(layer, nn.MaxPool2d):
        x = layer(x.masked_fill(~mask, float("-inf")))
    else:
        x = layer(x)
    return torch.where(mask_of(x, visible)[:, None], x, 0)


def densify(layer, x, visible):
    mask = mask_of(x, visible)
    rows = x.permute(0, 2, 3, 1)[mask]
    norm = layer.norm
    dense = layer.mask_token.flatten().expand(*mask.shape, -1).clone()
    dense[mask] = functional.batch_norm(rows, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
    return layer.projection(dense.permute(0, 3, 1, 2))


def simulated_loss(model, encoder, images, visible):
    x = simulate(encoder.stem, images * mask_of(images, visible)[:, None], visible)
    features = [x := simulate(each, x, visible) for each in encoder.stages]
    maps = [densify(layer, x, visible) for layer, x in zip(model.densify, reversed(features), strict=False)]
    prediction, target = (
        functional.unfold(x, model.patch_size, stride=model.patch_size) for x in (model.decoder(maps), images)
    )
    variance, mean = torch.var_mean(target, dim=1, keepdim=True)
    errors = (prediction - (target - mean) / (variance + 1e-6).sqrt()).square().mean(dim=1)
    return errors[~visible.flatten(1)].mean()


def twins(stages, backend="fused"):
    model = SparK(OwnEncoder(stages), image_size=(48, 64), decoder_width=16, backend=backend)
    randomise(model.double())
    dense = OwnEncoder(stages, DENSE).double()
    dense.load_state_dict(to_dense_state(model.encoder.state_dict(), dense))
    return model, dense


@pytest.mark.parametrize("stages, patch_size", [(2, 8), (3, 16)])
def test_loss_and_gradients_equal_the_simulation(stages, patch_size, backend, assert_close):
    model, dense = twins(stages, backend)
    assert model.patch_size == patch_size
    visible = contract_masks()
    shape = (len(visible), 3, 3 * patch_size, 4 * patch_size)
    images = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss, expected = model(images, visible), simulated_loss(model, dense, images, visible)
    assert_close(loss, expected, "loss")
    shared = {name: p for name, p in model.named_parameters() if not name.startswith("encoder.")}
    ours, theirs = ({"images": images} | dict(encoder.named_parameters()) for encoder in (model.encoder, dense))
    gradients = dict(zip([*ours, *shared], torch.autograd.grad(loss, [*ours.values(), *shared.values()])))
    wanted = dict(zip([*theirs, *shared], torch.autograd.grad(expected, [*theirs.values(), *shared.values()])))
    gradients = to_dense_state(gradients, dense)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_close(gradients[name], gradient, f"gradient of {name}")


def test_all_visible_is_the_plain_dense_network(backend, assert_close):
    model, dense = twins(3, backend)
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    for actual, expected in zip(model.encode(images), dense(images), strict=True):
        assert_close(actual, expected)
