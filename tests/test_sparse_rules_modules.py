"""Every rule of a module has its gather reference (`rule_references`), and what has none is refused."""

import math
import re

import pytest
import timm.layers
import torch
import torchvision
from conftest import randomise
from rule_references import PATCH, VISIBLE, Between, C, Operation, compare, of_images_alone, places, windowed
from timm.layers import grn, pool2d_same
from timm.layers.conv2d_same import Conv2dSame
from torch import nn
from torch.nn import functional as F

from spark_me import sparse
from spark_me.encoder import sparsify
from spark_me.errors import UserError
from spark_me.sparse.rules import modules

NOT_IN_PLACE = [kind for kind in modules.AT_EVERY_SITE if kind not in (nn.Linear, nn.Threshold, nn.RReLU)]


@pytest.mark.parametrize("kind", sorted(NOT_IN_PLACE, key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
def test_modules_of_each_site(kind, assert_close):
    options = {"p": 0.0} if kind in (nn.Dropout, nn.AlphaDropout) else {}
    compare(Between(kind(**options)), of_images_alone, assert_close)


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(inplace=True),
        nn.SiLU(inplace=True),
        nn.Threshold(0.1, 2),
        nn.RReLU().eval(),
        nn.GELU(approximate="tanh"),
        nn.GroupNorm(2, C),
        nn.GroupNorm(3, C, eps=0.1, affine=False),
        nn.InstanceNorm2d(C, affine=True),
        torchvision.models.convnext.LayerNorm2d(C),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveMaxPool2d((1, 1)),
        torchvision.ops.FrozenBatchNorm2d(C),
        torchvision.ops.StochasticDepth(0.0, "row"),
        timm.layers.GroupNorm(C, 3),
        timm.layers.GroupNorm1(C),
        timm.layers.GroupNormAct(C, 2),
        timm.layers.GroupNormAct(C, 2, apply_act=False),
        timm.layers.LayerNorm2d(C),
        timm.layers.LayerNormAct2d(C, act_layer=nn.SiLU),
        timm.layers.FrozenBatchNormAct2d(C),
        timm.layers.DropPath(0.0),
        grn.GlobalResponseNorm(C, channels_last=False),
        timm.layers.SEModule(C, rd_channels=4),
    ],
    ids=lambda module: type(module).__name__,
)
@pytest.mark.parametrize("backend", ["native"])
def test_modules_of_each_image(module, backend, assert_close):
    pooled = isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d)
    if pooled:
        module = Operation(lambda self, x: x * self.layers[0](x), module)
    compare(Between(module), of_images_alone, assert_close, backend, training=not isinstance(module, nn.RReLU))


@pytest.mark.parametrize(
    "module",
    [
        nn.LayerNorm(C),
        timm.layers.LayerNorm(C),
        timm.layers.LayerNormAct(C),
        grn.GlobalResponseNorm(C),
        nn.Linear(C, C),
    ],
    ids=lambda module: type(module).__name__,
)
def test_modules_of_channels_last(module, assert_close):
    operation = Operation(lambda self, x: self.layers[0](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), module)
    compare(Between(operation), of_images_alone, assert_close)


def per_channel(parameter):
    return parameter.view(1, -1, 1, 1)


def evo_norm(module, x):
    """arXiv 2004.02967, table 4; timm's own takes its deviations in float32."""
    if module.v is not None or isinstance(module, timm.layers.EvoNorm2dS0a):
        grouped = x.unflatten(1, (module.groups, -1))
        deviation = (grouped.var((2, 3, 4), unbiased=False, keepdim=True) + module.eps).sqrt()
        gate = 1 if module.v is None else (x * per_channel(module.v)).sigmoid()
        x = gate * (grouped / deviation).flatten(1, 2)
    return x * per_channel(module.weight) + per_channel(module.bias)


def filter_response_norm(module, x):
    """arXiv 1911.09737, equation 1; timm's own takes its means in float32."""
    x = x / (x.square().mean((2, 3), keepdim=True) + module.eps).sqrt()
    x = x * per_channel(module.weight) + per_channel(module.bias)
    if isinstance(module, timm.layers.FilterResponseNormAct2d):
        return module.act(x)
    return x if module.tau is None else torch.maximum(x, per_channel(module.tau))


@pytest.mark.parametrize(
    "module, function",
    [
        (timm.layers.EvoNorm2dS0(C, 2), evo_norm),
        (timm.layers.EvoNorm2dS0(C, 2, apply_act=False), evo_norm),
        (timm.layers.EvoNorm2dS0a(C, 3), evo_norm),
        (timm.layers.EvoNorm2dS0a(C, 3, apply_act=False), evo_norm),
        (timm.layers.FilterResponseNormAct2d(C), filter_response_norm),
        (timm.layers.FilterResponseNormTlu2d(C), filter_response_norm),
        (timm.layers.FilterResponseNormTlu2d(C, apply_act=False), filter_response_norm),
    ],
)
def test_norms_of_each_image_without_a_mean(module, function, assert_close):
    def reference(module, x, visible):
        return of_images_alone(lambda rows: function(module, rows), x, visible)

    compare(Between(module), reference, assert_close)


@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_in_place_overwrites_and_others_do_not(inplace):
    x = sparse.to_sparse(torch.randn(3, 5, 16, 24), sparse.Pyramid(VISIBLE, PATCH))
    before = x.F.clone()
    actual = modules.rowwise(nn.ReLU(inplace=inplace), x)
    assert actual.coordinate_map_key == x.coordinate_map_key
    assert torch.equal(actual.F, before.clamp(min=0)) and torch.equal(x.F, actual.F if inplace else before)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, None])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_with_an_activation(act, training, assert_close):
    module = timm.layers.BatchNormAct2d(C, act_layer=act, apply_act=act is not None)

    def reference(module, x, visible):
        sites = [(b, *site) for b, own in enumerate(places(visible, x.shape[2])) for site in own]
        rows = torch.stack([x[b, :, y, column] for b, y, column in sites])
        mean, variance = (rows.mean(0), rows.var(0, correction=0)) if training else statistics
        rows = (rows - mean) / (variance + module.eps).sqrt() * module.weight + module.bias
        rows = rows if act is None else act()(rows)
        out = rows.new_zeros(len(x), *x.shape[2:], C)
        return out.index_put(tuple(torch.tensor(sites).t()), rows).permute(0, 3, 1, 2)

    network = randomise(Between(module)).double()
    statistics = module.running_mean.clone(), module.running_var.clone()
    compare(network, reference, assert_close, training=training)


def weighted(kernel, bias=None, groups=1):
    """Sums of what is under the kernel [Cout, Cin/groups, h, w]; hidden sites and padding are zero."""

    def function(under):
        offsets = [offset for offset, values in under.items() if values is not None]
        total = kernel.new_zeros(len(kernel)) if bias is None else bias
        if offsets:
            matrices = torch.stack([kernel[:, :, down, across] for down, across in offsets])
            values = torch.stack([under[offset] for offset in offsets])
            parts = zip(matrices.chunk(groups, dim=1), values.chunk(groups, dim=1))
            total = total + torch.cat([torch.einsum("koc,kc->o", part, value) for part, value in parts])
        return total

    return function


def standardised(module):
    """Mean 0 and deviation 1 of every kernel."""
    weight = module.weight.flatten(1)
    centred = weight - weight.mean(1, keepdim=True)
    weight = centred / (centred.square().mean(1, keepdim=True) + module.eps).sqrt()
    gain = module.gain.flatten(1) * module.scale if hasattr(module, "gain") else 1
    return (weight * gain).view_as(module.weight)


@pytest.mark.parametrize(
    "module, before",
    [
        (timm.layers.StdConv2d(C, C, 3, padding=1, bias=True), (1, 1)),
        (timm.layers.StdConv2d(C, C, 3, stride=2, padding=1, groups=2), (1, 1)),
        (timm.layers.StdConv2dSame(C, C, 3, stride=2), (0, 0)),
        (timm.layers.StdConv2dSame(C, C, 4), (1, 1)),
        (timm.layers.ScaledStdConv2d(C, C, 3, padding=1), (1, 1)),
        (timm.layers.ScaledStdConv2d(C, C, 3, stride=2, padding=1, gamma=1.7), (1, 1)),
        (timm.layers.ScaledStdConv2dSame(C, C, 3, stride=2), (0, 0)),
        (timm.layers.ScaledStdConv2dSame(C, C, 3), (1, 1)),
        (Conv2dSame(C, C, 3, 2, bias=True), (0, 0)),
        (Conv2dSame(C, C, 5, 2, groups=3), (1, 1)),
        (Conv2dSame(C, C, (3, 2)), (1, 0)),
        (Conv2dSame(C, C, 3, 2, groups=C), (0, 0)),
        (nn.Conv2d(C, C, (1, 7), padding=(0, 3), groups=C), (0, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_convolutions(module, before, backend, assert_close):
    def reference(module, x, visible):
        kernel = standardised(module) if "Std" in type(module).__name__ else module.weight
        return windowed(x, visible, weighted(kernel, module.bias, module.groups), kernel.shape[2:], step, before)

    step = module.stride[0]
    compare(Between(module, step=step), reference, assert_close, backend)


def seen(under):
    return torch.stack([values for values in under.values() if values is not None])


def mean_of_same_padding(size):
    """Of timm's pooling, where the places of padding count: those that are not under the kernel's part in the map."""

    def function(under):
        return seen(under).sum(0) / (len(seen(under)) + size[0] * size[1] - len(under))

    return function


@pytest.mark.parametrize(
    "module, function, size, before",
    [
        (pool2d_same.MaxPool2dSame(3, 2), lambda under: seen(under).amax(0), (3, 3), (0, 0)),
        (pool2d_same.MaxPool2dSame((2, 3), 1), lambda under: seen(under).amax(0), (2, 3), (0, 1)),
        (pool2d_same.AvgPool2dSame(2, 2), mean_of_same_padding((2, 2)), (2, 2), (0, 0)),
        (pool2d_same.AvgPool2dSame(3, 2), mean_of_same_padding((3, 3)), (3, 3), (0, 0)),
        (pool2d_same.AvgPool2dSame(2, 1), mean_of_same_padding((2, 2)), (2, 2), (0, 0)),
        (nn.MaxPool2d(3, 2, ceil_mode=True), lambda under: seen(under).amax(0), (3, 3), (0, 0)),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), lambda under: seen(under).mean(0), (3, 3), (1, 1)),
        (lambda self, x: F.max_pool2d(x, 3, stride=2, padding=1), lambda under: seen(under).amax(0), (3, 3), (1, 1)),
        (lambda self, x: F.avg_pool2d(x, 2), lambda under: seen(under).mean(0), (2, 2), (0, 0)),
        (lambda self, x: x[:, :, ::2, ::2], lambda under: under[0, 0], (1, 1), (0, 0)),
        (lambda self, x: F.conv2d(x, self.constant.flatten().diag()[:, :, None, None], stride=2), None, (1, 1), (0, 0)),
    ],
)
def test_pooling_and_every_other_site(module, function, size, before, assert_close):
    step = getattr(module, "stride", 2)
    step = step if isinstance(step, int) else step[0]

    def reference(module, x, visible):
        own = function or weighted(module.constant.flatten().diag()[:, :, None, None])
        return windowed(x, visible, own, size, step, before)

    compare(Between(module, step=step), reference, assert_close)


@pytest.mark.parametrize("size", [3, 5])
def test_blur_is_the_weighted_mean_of_visible_sites_mirrored_at_the_border(size, backend, assert_close):
    filt = torch.tensor([math.comb(size - 1, k) for k in range(size)], dtype=torch.float64) / 2 ** (size - 1)

    def function(under):
        weights = [filt[down] * filt[across] for (down, across), values in under.items() if values is not None]
        return torch.stack(weights) @ seen(under) / sum(weights)

    def reference(module, x, visible):
        before = module.padding[0]  # as timm pads
        return windowed(x, visible, function, (size, size), 2, (before, before), mirrored=True)

    compare(Between(timm.layers.BlurPool2d(C, filt_size=size), step=2), reference, assert_close, backend)


def test_blur_with_zeros_around_the_map_counts_them_as_sites(assert_close):
    filt = torch.tensor([1, 2, 1], dtype=torch.float64) / 4

    def function(under):
        hidden = sum(filt[down] * filt[across] for (down, across), value in under.items() if value is None)
        weights = [filt[down] * filt[across] for (down, across), values in under.items() if values is not None]
        return torch.stack(weights) @ seen(under) / (1 - hidden)

    def reference(module, x, visible):
        return windowed(x, visible, function, (3, 3), 2, (1, 1))

    compare(Between(timm.layers.BlurPool2d(C, filt_size=3, pad_mode="constant"), step=2), reference, assert_close)


@pytest.mark.parametrize("padding", [None, nn.Identity(), nn.ZeroPad2d((0, 1, 0, 1))])
def test_zeros_around_a_map_belong_to_what_reads_it(padding, assert_close):
    """Before a convolution, by a function or a layer, and through a layer that does nothing."""

    def function(self, x):
        x = x if isinstance(padding, nn.ZeroPad2d) else F.pad(x, (0, 1, 0, 1))
        for layer in self.layers:
            x = layer(x)
        return x

    convolution = nn.Conv2d(C, C, 3, 2)
    module = Operation(function, *([] if padding is None else [padding]), convolution)

    def reference(module, x, visible):
        return windowed(x, visible, weighted(convolution.weight, convolution.bias), (3, 3), 2, (0, 0))

    compare(Between(module, step=2), reference, assert_close)


def drawn(module, times=200):
    """What a module makes of ones, in training: [times, images, C], equal at all sites of an image."""
    network = Between(module)
    nn.init.zeros_(network.stem.weight), nn.init.ones_(network.stem.bias)
    encoder = sparsify(network.train())
    layer = encoder.operation
    x = sparse.to_sparse(torch.ones(3, C, 8, 12), sparse.Pyramid(VISIBLE, PATCH, "native"), 2)
    torch.manual_seed(0)
    outcomes = []
    for _ in range(times):
        dense = sparse.to_dense(layer(x))
        mask = sparse.to_dense(x)
        factors = dense.amax((2, 3)).double()
        assert torch.equal(dense, mask * factors.float()[:, :, None, None])
        outcomes.append(factors)
    assert torch.equal(layer.eval()(x).F, x.F)
    return torch.stack(outcomes)


@pytest.mark.parametrize(
    "module, kept, together",
    [
        (nn.Dropout2d(0.4), 1 / 0.6, False),
        (timm.layers.DropPath(0.4), 1 / 0.6, True),
        (timm.layers.DropPath(0.4, scale_by_keep=False), 1, True),
        (torchvision.ops.StochasticDepth(0.4, "row"), 1 / 0.6, True),
    ],
)
def test_what_is_dropped_is_dropped_for_whole_images(module, kept, together):
    outcomes = drawn(module)
    assert set(outcomes.float().unique().tolist()) == {0.0, torch.tensor(kept).float().item()}
    assert (outcomes.mean(0) - 0.6 * kept).abs().max() < 0.3
    assert (outcomes == outcomes[:, :, :1]).all() == together  # channels of an image, among each other
    assert not (outcomes == outcomes[:, :1]).all()


def test_stochastic_depth_of_a_batch_drops_all_images():
    outcomes = drawn(torchvision.ops.StochasticDepth(0.4, "batch"))
    assert (outcomes == outcomes[:, :1, :1]).all() and len(outcomes.unique()) == 2


def upsampled(self, x):
    return self.layers[0](F.interpolate(x, scale_factor=2))


def attention(self, x):
    queries = x.flatten(2).transpose(1, 2)
    return ((queries @ queries.transpose(1, 2)).softmax(-1) @ queries).transpose(1, 2).view(x.shape)


def unshuffled_by_view(self, x):
    images, channels, height, width = x.shape
    return x.view(images, channels * 4, height // 2, width // 2)


def decides(self, x):
    return x if x.mean() > 0 else -x


def twice_padded(self, x):
    return self.layers[0](F.pad(F.pad(x, (0, 1, 0, 1)), (1, 0, 1, 0)))


REFUSED = {
    "attention": (attention, "matmul", {}),
    "softmax over sites": (lambda self, x: x * x.flatten(2).softmax(2).view(x.shape), "softmax", {}),
    "interpolate": (Operation(upsampled, nn.Conv2d(C, C, 2, 2)), "interpolate in operation", {}),
    "nn.Upsample": (nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(C, C, 2, 2)), "Upsample operation.0", {}),
    "stride 3": (nn.Conv2d(C, C, 3, 3), "operation", {}),
    "shifted sites": (nn.Conv2d(C, C, 3, 1, padding="valid"), "Conv2d operation", {}),
    "reflection": (nn.Conv2d(C, C, 3, 1, 1, padding_mode="reflect"), "padding_mode='reflect'", {}),
    "mixed sites and channels": (unshuffled_by_view, "view", {"channels": 4 * C, "step": 2}),
    "pixel unshuffle": (nn.PixelUnshuffle(2), "PixelUnshuffle operation", {"channels": 4 * C, "step": 2}),
    "values decide": (decides, "must not decide by values", {}),
    "indices": (
        Operation(lambda self, x: self.layers[0](x)[0], nn.MaxPool2d(2, return_indices=True)),
        "returns indices", {"step": 2},
    ),
    "transposed": (lambda self, x: x.transpose(2, 3).transpose(2, 3), "transpose", {}),
    "sum over rows": (lambda self, x: x + x.mean(2, keepdim=True), "mean", {}),
    "joined along rows": (lambda self, x: torch.cat([x, x], 2)[:, :, ::2, :], "cat", {}),
    "cropped": (lambda self, x: F.pad(x[:, :, 1:, 1:], (1, 0, 1, 0)), "getitem", {}),
    "parts at once": (lambda self, x: torch.cat(x.chunk(2, dim=1), dim=1), "cat in operation", {}),
    "padded twice": (Operation(twice_padded, nn.Conv2d(C, C, 3)), "pads what is padded with zeros", {}),
    "padded and cropped": (
        Operation(lambda self, x: self.layers[0](F.pad(x, (-1, 1, 0, 0))), nn.Conv2d(C, C, 3, padding=1)),
        "pads what is cropped", {},
    ),
    "padded beside same padding": (
        Operation(lambda self, x: self.layers[0](F.pad(x, (-1, 1, 0, 0))), Conv2dSame(C, C, 3)),
        "pads what is padded with zeros", {},
    ),
    "running statistics of instances": (nn.InstanceNorm2d(C, track_running_stats=True), "track_running_stats=True", {}),
    "no module known": (torchvision.ops.DropBlock2d(0.1, 3), "drop_block2d in operation", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_on_sites_is_refused_in_a_line(case):
    module, named, options = REFUSED[case]
    with pytest.raises(UserError) as refusal:
        sparsify(Between(module, **options))
    message = str(refusal.value)
    assert named in message and "\n" not in message
    assert re.search(r"(test_sparse_rules_modules|rule_references|torchvision/ops/drop_block).py, line \d+\)", message)
    assert "Between" in message
    assert "spark_me.sparse.rule" in message or "use strides of 1 and 2, and padding that keeps the size" in message
