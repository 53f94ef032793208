"""The simulation of masking against loops over positions, and against networks that see a visible patch alone."""

import copy
import itertools
import math

import pytest
import timm.layers
import torch
import torchvision
from conftest import randomise
from torch import nn
from torch.nn import functional

from spark_me.masked_dense import MaskedDense

TOLERANCE = 1e-12
NETWORKS = {
    "resnet18": (torchvision.models.resnet18, [("layer1", 4), ("layer2", 8), ("layer3", 16), ("layer4", 32)]),
    "densenet121": (
        torchvision.models.densenet121,
        [("features.denseblock1", 4), ("features.denseblock2", 8), ("", 32)],
    ),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, [("features.8", 16), ("features", 32)]),
    "shufflenet_v2": (torchvision.models.shufflenet_v2_x0_5, [("stage2", 8), ("conv5", 32)]),
    "convnext_tiny": (torchvision.models.convnext_tiny, [("features.1", 4), ("features.3", 8), ("features.7", 32)]),
    "convnextv2_atto": (lambda: timm.create_model("convnextv2_atto"), [("stages.0", 4), ("stages.3", 32)]),
    "convnextv2_atto, linear": (
        lambda: timm.create_model("convnextv2_atto", conv_mlp=False),
        [("stages.0", 4), ("stages.3", 32)],
    ),
    "seresnet18": (lambda: timm.create_model("seresnet18"), [("layer1", 4), ("layer4", 32)]),
    "tf_efficientnet_b0": (lambda: timm.create_model("tf_efficientnet_b0"), [("blocks.2", 8), ("conv_head", 32)]),
    "resnetblur18": (lambda: timm.create_model("resnetblur18"), [("layer1", 4), ("layer4", 32)]),
    "resnetv2_18": (lambda: timm.create_model("resnetv2_18"), [("stages.1", 8), ("norm", 32)]),
    "nf_resnet26": (lambda: timm.create_model("nf_resnet26"), [("stages.0", 4), ("stages.3", 32)]),
}
OF_A_PATCH_ALONE = [name for name in NETWORKS if name != "resnetblur18"]
"""Networks to which what is hidden is what is outside of an image; that blur reflects at the border of an image."""


@pytest.fixture(autouse=True)
def deterministic(one_thread, shallow):
    torch.manual_seed(0)


class Apply(nn.Module):
    """A function as a network."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.modules_of = function, nn.ModuleList(modules)

    def forward(self, x):
        return self.function(x, *self.modules_of)


def maps(visible, factor=2, channels=5):
    """Images of different scale and offset, NaN where they are hidden."""
    images, height, width = visible.shape
    x = torch.randn(images, channels, height * factor, width * factor, dtype=torch.float64)
    x = (x + 0.5) * torch.arange(1, images + 1).view(-1, 1, 1, 1)
    return x.masked_fill(~at(visible, factor)[:, None], math.nan)


def at(visible, factor):
    """The mask at another resolution, place by place."""
    images, height, width = visible.shape
    mask = torch.zeros(images, height * factor, width * factor, dtype=torch.bool)
    for image, y, x in itertools.product(range(images), range(height * factor), range(width * factor)):
        mask[image, y, x] = visible[image, y // factor, x // factor]
    return mask


def simulate(network, x, visible, stride=1):
    (out,) = MaskedDense(network.double(), [("", stride)])(x, visible)
    return out


def places(visible, x):
    return [tuple(place) for place in at(visible, x.shape[2] // visible.shape[1]).nonzero().tolist()]


def window(x, visible, place, kernel, stride, before, dilation=1):
    """The inputs of an output place: (tap down, tap across, values [C] or None where hidden, None outside)."""
    image, down, across = place
    mask = at(visible, x.shape[2] // visible.shape[1])[image]
    for tap_y, tap_x in itertools.product(range(kernel), repeat=2):
        y, column = down * stride - before + tap_y * dilation, across * stride - before + tap_x * dilation
        inside = 0 <= y < x.shape[2] and 0 <= column < x.shape[3]
        seen = inside and bool(mask[y, column])
        yield tap_y, tap_x, (x[image, :, y, column] if seen else None), inside


def assert_at(visible, out, expected):
    """`expected` maps the places of visible outputs to values; all others are zero."""
    wanted = torch.zeros_like(out)
    for (image, y, x), values in expected.items():
        wanted[image, :, y, x] = values
    torch.testing.assert_close(out, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def rows(x, visible, image):
    """The visible values of an image, [n, C]."""
    return torch.stack([x[i, :, y, column] for i, y, column in places(visible, x) if i == image])


@pytest.mark.parametrize(
    "kernel, stride, padding, dilation, groups",
    [(3, 1, 1, 1, 1), (3, 2, 1, 1, 5), (7, 2, 3, 1, 1), (3, 1, 2, 2, 1), (1, 2, 0, 1, 1), (2, 2, 0, 1, 1)],
)
def test_convolution(visible, kernel, stride, padding, dilation, groups):
    conv = nn.Conv2d(5, 5, kernel, stride, padding, dilation, groups).double()
    x = maps(visible)
    out = simulate(conv, x, visible, stride)
    weight = conv.weight.new_zeros(5, 5, kernel, kernel)
    for channel in range(5):  # a grouped kernel as a full one
        weight[channel, (channel if groups > 1 else slice(None))] = conv.weight[
            channel, 0 if groups > 1 else slice(None)
        ]
    expected = {}
    for place in places(visible, out):
        taps = window(x, visible, place, kernel, stride, padding, dilation)
        expected[place] = conv.bias + sum(weight[:, :, i, j] @ values for i, j, values, _ in taps if values is not None)
    assert_at(visible, out, expected)


def test_convolution_with_same_padding(visible):
    conv = timm.layers.create_conv2d(5, 4, 3, stride=2, padding="same").double()
    assert type(conv).__name__ == "Conv2dSame"
    x = maps(visible)
    out = simulate(conv, x, visible, 2)
    expected = {
        place: sum(
            conv.weight[:, :, i, j] @ values
            for i, j, values, _ in window(x, visible, place, 3, 2, 0)  # what is padded comes after
            if values is not None
        )
        for place in places(visible, out)
    }
    assert_at(visible, out, expected)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(visible, training):
    norm = randomise(nn.BatchNorm2d(5).double()).train(training)
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    x = maps(visible)
    out = simulate(norm, x, visible)
    seen = torch.stack([x[i, :, y, column] for i, y, column in places(visible, x)])
    if training:
        torch.testing.assert_close(norm.running_mean, 0.9 * mean + 0.1 * seen.mean(0))
        torch.testing.assert_close(norm.running_var, 0.9 * variance + 0.1 * seen.var(0))
        mean, variance = seen.mean(0), seen.var(0, correction=0)
    scale = norm.weight / (variance + norm.eps).sqrt()
    expected = {(i, y, c): (x[i, :, y, c] - mean) * scale + norm.bias for i, y, c in places(visible, x)}
    assert_at(visible, out, expected)


@pytest.mark.parametrize("same", [False, True])
def test_max_pool(visible, same):
    pool = timm.layers.pool2d_same.MaxPool2dSame(3, 2) if same else nn.MaxPool2d(3, 2, 1)
    x = maps(visible) - 100  # a hidden zero would win
    out = simulate(pool, x, visible, 2)
    expected = {}
    for place in places(visible, out):
        seen = [values for *_, values, _ in window(x, visible, place, 3, 2, 0 if same else 1) if values is not None]
        expected[place] = torch.stack(seen).amax(0)
    assert_at(visible, out, expected)


@pytest.mark.parametrize(
    "kernel, stride, padding, ceil_mode, include_padding, divisor",
    [
        (2, 2, 0, False, True, None),
        (3, 1, 1, False, True, None),
        (3, 2, 1, False, True, None),
        (3, 2, 1, False, False, None),
        (3, 2, 0, True, True, None),
        (3, 1, 1, False, True, 7),
    ],
)
def test_average_pool(visible, kernel, stride, padding, ceil_mode, include_padding, divisor):
    pool = nn.AvgPool2d(kernel, stride, padding, ceil_mode, include_padding, divisor)
    x = maps(visible)
    out = simulate(pool, x, visible, stride)
    expected = {}
    for place in places(visible, out):
        taps = list(window(x, visible, place, kernel, stride, padding))
        seen = [values for *_, values, _ in taps if values is not None]
        count = len(seen)
        if include_padding and padding:  # without a padding what sticks out does not count, as in torch
            count += sum(not inside for *_, inside in taps)
        expected[place] = sum(seen) / (divisor or count)
    assert_at(visible, out, expected)


@pytest.mark.parametrize(
    "size, stride, mode", [(3, 2, "reflect"), (5, 2, "reflect"), (3, 2, "constant"), (3, 1, "reflect")]
)
def test_blur_is_a_weighted_mean(visible, size, stride, mode):
    x = maps(visible)
    blur = timm.layers.BlurPool2d(5, size, stride, mode).double()
    out = simulate(blur, x, visible, stride)
    mask, weights, border = at(visible, 2), blur.filt[0, 0], blur.padding[0]
    expected = {}
    for image, down, across in places(visible, out):
        total, share = 0, 0
        for i, j in itertools.product(range(size), repeat=2):
            place = []
            for start, tap, length in ((down, i, x.shape[2]), (across, j, x.shape[3])):
                at_ = start * stride - border + tap
                inside = 0 <= at_ < length
                place.append(at_ if inside or mode == "constant" else -at_ if at_ < 0 else 2 * (length - 1) - at_)
            outside = mode == "constant" and not (0 <= place[0] < x.shape[2] and 0 <= place[1] < x.shape[3])
            if outside:
                share = share + weights[i, j]  # a zero of the blur's own
            elif mask[image, place[0], place[1]]:
                share = share + weights[i, j]
                total = total + weights[i, j] * x[image, :, place[0], place[1]]
        expected[image, down, across] = total / share
    assert_at(visible, out, expected)


def over_nhwc(reduce):
    return lambda x: reduce(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


REDUCTIONS = {
    "Tensor.mean": (lambda x: x.mean((2, 3), keepdim=True), lambda r: r.mean(0)),
    "mean, negative": (lambda x: x.mean((-2, -1))[:, :, None, None], lambda r: r.mean(0)),
    "mean, aliases": (lambda x: torch.mean(x, axis=[2, 3])[:, :, None, None], lambda r: r.mean(0)),
    "mean, all channels": (lambda x: x.mean((1, 2, 3), keepdim=True).expand(-1, 5, -1, -1), lambda r: r.mean()),
    "mean, flattened": (lambda x: x.flatten(2).mean(-1)[:, :, None, None], lambda r: r.mean(0)),
    "mean, view": (lambda x: x.view(*x.shape[:2], -1).mean(2)[:, :, None, None], lambda r: r.mean(0)),
    "mean, NHWC": (over_nhwc(lambda x: x.mean((1, 2), keepdims=True)), lambda r: r.mean(0)),
    "sum": (lambda x: x.sum((2, 3), keepdim=True), lambda r: r.sum(0)),
    "amax": (lambda x: torch.amax(x - 100, (2, 3), keepdim=True), lambda r: r.amax(0) - 100),
    "amin": (lambda x: x.abs().amin((2, 3), keepdim=True), lambda r: r.abs().amin(0)),
    "adaptive average": (lambda x: functional.adaptive_avg_pool2d(x, (1, 1)), lambda r: r.mean(0)),
    "adaptive maximum": (lambda x: functional.adaptive_max_pool2d(x - 100, 1), lambda r: r.amax(0) - 100),
    "average of the whole": (lambda x: functional.avg_pool2d(x, x.shape[2:]), lambda r: r.mean(0)),
    "Tensor.norm, NHWC": (
        over_nhwc(lambda x: x.norm(p=2, dim=(1, 2), keepdim=True)),
        lambda r: r.square().sum(0).sqrt(),
    ),
    "vector_norm": (lambda x: torch.linalg.vector_norm(x, 2, (2, 3), True), lambda r: r.square().sum(0).sqrt()),
    "var, biased": (lambda x: x.var((2, 3), False, True), lambda r: r.var(0, correction=0)),
    "var": (lambda x: x.var(dim=(2, 3), keepdim=True), lambda r: r.var(0)),
    "std": (lambda x: torch.std(x, (2, 3), correction=0)[:, :, None, None], lambda r: r.std(0, correction=0)),
    "var_mean": (lambda x: sum(torch.var_mean(x, (2, 3), keepdim=True)), lambda r: r.var(0) + r.mean(0)),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction_is_per_image_over_visible_positions(visible, name):
    function, of_rows = REDUCTIONS[name]
    x = maps(visible)
    out = simulate(Apply(lambda x: torch.zeros_like(x) + function(x)), x, visible)
    of_images = [of_rows(rows(x, visible, image)) for image in range(len(visible))]
    assert_at(visible, out, {place: of_images[place[0]] for place in places(visible, x)})


def test_statistics_of_the_batch(visible):
    x = maps(visible)
    out = simulate(Apply(lambda x: torch.zeros_like(x) + x.var((0, 2, 3), unbiased=False)[:, None, None]), x, visible)
    variance = torch.cat([rows(x, visible, image) for image in range(len(visible))]).var(0, correction=0)
    assert_at(visible, out, dict.fromkeys(places(visible, x), variance))


def test_reduction_over_channels_is_of_each_position(visible):
    x = maps(visible)
    out = simulate(Apply(lambda x: x - x.mean(1, keepdim=True)), x, visible)
    assert_at(visible, out, {(i, y, c): x[i, :, y, c] - x[i, :, y, c].mean() for i, y, c in places(visible, x)})


def test_reduction_over_rows_alone_is_refused(visible):
    with pytest.raises(NotImplementedError, match="mean over one"):
        simulate(Apply(lambda x: x * x.mean(3, keepdim=True)), maps(visible), visible)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm(visible, groups):
    norm = nn.InstanceNorm2d(6, affine=True) if groups == 6 else nn.GroupNorm(groups, 6)
    norm = randomise(norm.double())
    x = maps(visible, channels=6)
    out = simulate(norm, x, visible)
    expected = {}
    for image in range(len(visible)):
        seen = rows(x, visible, image).unflatten(1, (groups, -1))
        mean, variance = seen.mean((0, 2)), seen.var((0, 2), correction=0)
        repeat = 6 // groups
        mean, variance = mean.repeat_interleave(repeat), variance.repeat_interleave(repeat)
        for i, y, c in places(visible, x):
            if i == image:
                normalised = (x[i, :, y, c] - mean) / (variance + norm.eps).sqrt()
                expected[i, y, c] = normalised * norm.weight + norm.bias
    assert_at(visible, out, expected)


def test_attention_over_positions(visible):
    x = maps(visible)
    context = randomise(timm.layers.GlobalContext(5, fuse_add=True, fuse_scale=False).double())
    out = simulate(context, x, visible)
    expected = {}
    for image in range(len(visible)):
        seen = rows(x, visible, image)
        scores = seen @ context.conv_attn.weight[0, :, 0, 0] + context.conv_attn.bias
        pooled = (scores.softmax(0)[:, None] * seen).sum(0)
        added = context.mlp_add(pooled[None, :, None, None])[0, :, 0, 0]
        expected |= {(i, y, c): x[i, :, y, c] + added for i, y, c in places(visible, x) if i == image}
    assert_at(visible, out, expected)


def test_standardised_weights_are_no_maps(visible):
    conv = timm.layers.ScaledStdConv2d(5, len(visible), 3, padding=1).double()
    x = torch.randn(6, 5, 6, 8, dtype=torch.float64)
    expected = conv(x * at(visible, 2)[:, None]) * at(visible, 2)[:, None]
    torch.testing.assert_close(simulate(conv, x, visible), expected)


def test_ambiguous_layout_is_followed():
    visible = torch.tensor([[[True, False], [False, False]]])
    x = maps(visible, factor=2, channels=4)  # as many channels as rows and columns
    linear = nn.Linear(4, 4).double()
    network = Apply(lambda x, linear: linear(x.permute(0, 2, 3, 1)), linear)
    out = simulate(network, x, visible)
    assert_at(visible, out, {(i, y, c): linear(x[i, :, y, c]) for i, y, c in places(visible, x)})


def plus_one_in_place(x, conv):
    x = functional.relu(x)
    x.view(-1).add_(1)  # hidden positions are zero no more, and `x` itself saw nothing of it
    return conv(x)


def test_change_through_a_view_is_noticed(visible):
    conv = nn.Conv2d(5, 3, 3, padding=1).double()
    x, mask = maps(visible), at(visible, 2)[:, None]
    expected = conv((x.nan_to_num().relu() + 1) * mask) * mask
    torch.testing.assert_close(simulate(Apply(plus_one_in_place, conv), x, visible), expected)


def test_tap_is_saved_from_functions_in_place(visible):
    network = nn.Sequential(nn.Conv2d(5, 3, 3, padding=1), nn.ReLU(inplace=True)).double()
    x, mask = maps(visible), at(visible, 2)[:, None]
    before, after = MaskedDense(network, [("0", 1), ("", 1)])(x, visible)
    expected = network[0](x.nan_to_num()) * mask
    torch.testing.assert_close(before, expected)
    torch.testing.assert_close(after, expected.relu())


def test_what_is_asked_for_must_exist(visible):
    network = nn.Conv2d(5, 3, 3, padding=1).double()
    with pytest.raises(LookupError, match="no map of stride 2 in the forward of 'the network'"):
        MaskedDense(network, [("", 2)])(maps(visible), visible)
    with pytest.raises(ValueError, match="no multiple of the mask"):
        MaskedDense(network, [("", 1)])(torch.zeros(6, 5, 7, 8), visible)
    off_the_grid = nn.Sequential(nn.Conv2d(5, 3, 3), nn.Conv2d(3, 3, 3, padding=2)).double()
    with pytest.raises(NotImplementedError, match=r"conv2d of \(6, 3, 4, 6\)"):
        MaskedDense(off_the_grid, [("", 1)])(maps(visible), visible)


def build(name):
    make, taps = NETWORKS[name]
    return randomise(make().double().eval()), taps


@pytest.mark.parametrize("name", NETWORKS)
def test_all_visible_is_the_network(name):
    network, taps = build(name)
    images = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    returned = {}
    for path, _ in taps:
        network.get_submodule(path).register_forward_hook(lambda *call, path=path: returned.update({path: call[2]}))
    with torch.no_grad():
        out = MaskedDense(copy.deepcopy(network), taps)(images, torch.ones(1, 2, 3, dtype=torch.bool))
        network(images)
    for (path, stride), x in zip(taps, out):
        assert x.shape[2:] == (64 // stride, 96 // stride)
        expected = returned[path]
        if expected.dim() == 4 and expected.shape[2:] == x.shape[2:]:
            assert ((x - expected).abs().max() / expected.abs().max()).item() < TOLERANCE


@pytest.mark.parametrize("name", OF_A_PATCH_ALONE)
def test_visible_patch_is_an_image_of_its_own(name):
    """A patch alone, at the border or not: the plain network on it, with its statistics and gradients."""
    network, taps = build(name)
    for module in network.modules():
        # Of few positions in deep layers; more norms of them in a row would amplify roundings.
        module.train(isinstance(module, nn.BatchNorm2d) and name in ("resnet18", "seresnet18"))
    alone = copy.deepcopy(network)
    visible = torch.zeros(2, 3, 4, dtype=torch.bool)
    visible[0, 1, 2] = visible[1, 2, 0] = True
    images = torch.randn(2, 3, 96, 128, dtype=torch.float64)
    patches = torch.stack([images[0, :, 32:64, 64:96], images[1, :, 64:96, :32]])
    out = MaskedDense(network, taps)(images.masked_fill(~at(visible, 32)[:, None], math.nan), visible)
    expected = MaskedDense(alone, taps)(patches, torch.ones(2, 1, 1, dtype=torch.bool))
    loss, loss_alone = 0, 0
    for x, of_patches, (_, stride) in zip(out, expected, taps):
        side = 32 // stride
        cut = torch.stack([x[0, :, side : 2 * side, 2 * side : 3 * side], x[1, :, 2 * side : 3 * side, :side]])
        assert not x.masked_fill(at(visible, side)[:, None], 0).any()
        assert ((cut - of_patches).abs().max() / of_patches.abs().max()).item() < 1e-10
        upstream = torch.randn_like(cut)
        loss, loss_alone = loss + (cut * upstream).sum(), loss_alone + (of_patches * upstream).sum()
    loss.backward()
    loss_alone.backward()
    for (key, ours), theirs in zip(network.named_parameters(), alone.parameters()):
        if theirs.grad is not None:
            assert (ours.grad - theirs.grad).abs().max() <= 1e-9 * max(theirs.grad.abs().max(), 1), key
    for (key, ours), theirs in zip(network.named_buffers(), alone.buffers()):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=key)


def test_network_without_a_mask_is_unchanged(visible):
    network = randomise(torchvision.models.resnet18().double().eval())
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    plain = network(images)
    masked = MaskedDense(network, [("layer4", 32)])
    torch.testing.assert_close(network(images), plain)
    twin = copy.deepcopy(masked)
    half = torch.tensor([[[True, False, True], [False, True, False]]]).expand(2, -1, -1)
    torch.testing.assert_close(twin(images, half)[0], masked(images, half)[0])


def test_compiles_to_one_graph(visible):
    network = nn.Sequential(
        nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.GroupNorm(2, 6)
    )
    masked = MaskedDense(randomise(network.double()), [("", 2)])
    compiled = torch.compile(copy.deepcopy(masked), backend="eager", fullgraph=True, dynamic=False)
    x = maps(visible)
    torch.testing.assert_close(compiled(x, visible), masked(x, visible))
    torch.testing.assert_close(compiled.state_dict()["_orig_mod.network.1.running_var"], network[1].running_var)
