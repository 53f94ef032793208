"""The exactness contract for a network of one's own: ordinary layers of torch, none of them known by name here."""

import os

import pytest
import torch
import torchvision
from child import Child
from conftest import contract_masks, randomise
from torch import nn
from torch.nn import functional

import spark_me
from spark_me.networks import dense_network


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=2, dilation=2, groups=4, bias=False),
            nn.InstanceNorm2d(channels, affine=True),
            nn.Hardswish(),
            torchvision.ops.SqueezeExcitation(channels, 4, scale_activation=nn.Hardsigmoid),
            nn.Conv2d(channels, channels, 1, groups=2),
        )

    def forward(self, x):
        return x + self.body(x)


def stage(c_in, c_out, stride):
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, stride, 1, groups=2, bias=False),
        nn.GroupNorm(4, c_out),
        nn.LeakyReLU(0.1),
        nn.MaxPool2d(3, 1, 1),
        Residual(c_out),
        nn.SiLU(),  # without it, densify's norm would remove the bias before it
    )


class OwnNetwork(nn.Module):
    """Total stride 8 with two stages, 16 with three."""

    def __init__(self, stages, in_channels=3, num_classes=5):
        super().__init__()
        widths = [8, *(8 * 2**level for level in range(stages))]
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 8, 7, 2, 3), nn.SiLU(), nn.AvgPool2d(2, 2))
        self.stages = nn.ModuleList(
            stage(*pair, stride=2 if level else 1) for level, pair in enumerate(zip(widths, widths[1:]))
        )
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, x):
        x = self.stem(x)
        for each in self.stages:
            x = each(x)
        return self.classifier(x.mean((2, 3)))


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


def simulated_features(network, images, visible):
    """Of every stride from 2 on, the last map: in the stem that before its pooling, else what a stage returns."""
    x = simulate(network.stem[:2], images * mask_of(images, visible)[:, None], visible)
    features = [x]
    x = simulate(network.stem[2], x, visible)
    return features + [x := simulate(each, x, visible) for each in network.stages]


def simulated_loss(model, network, images, visible):
    features = simulated_features(network, images, visible)
    maps = [densify(layer, x, visible) for layer, x in zip(model.densify, reversed(features), strict=True)]
    prediction, target = (
        functional.unfold(x, model.patch_size, stride=model.patch_size) for x in (model.decoder(maps), images)
    )
    variance, mean = torch.var_mean(target, dim=1, keepdim=True)
    errors = (prediction - (target - mean) / (variance + 1e-6).sqrt()).square().mean(dim=1)
    return errors[~visible.flatten(1)].mean()


def twins(stages, backend="native"):
    """A model, and the network that it was made of: they share the encoder's parameters."""
    network = OwnNetwork(stages)
    model = spark_me.build_model(network, image_size=(48, 64), decoder_width=16, backend=backend)
    randomise(model.double())
    return model, network.double()


@pytest.mark.parametrize("stages, patch_size", [(2, 8), (3, 16)])
def test_loss_and_gradients_equal_the_simulation(stages, patch_size, backend, assert_close):
    model, network = twins(stages, backend)
    assert model.patch_size == patch_size and model.encoder.strides == (2, 4, 8, 16)[: stages + 1]
    visible = contract_masks()
    shape = (len(visible), 3, 3 * patch_size, 4 * patch_size)
    images = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    named = {"images": images} | dict(model.named_parameters())
    loss, expected = model(images, visible), simulated_loss(model, network, images, visible)
    assert_close(loss, expected, "loss")
    gradients, wanted = (torch.autograd.grad(each, list(named.values())) for each in (loss, expected))
    for name, gradient, other in zip(named, gradients, wanted, strict=True):
        assert_close(gradient, other, f"gradient of {name}")


def test_all_visible_is_the_plain_dense_network(backend, assert_close):
    model, network = twins(3, backend)
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    x = network.stem(images)
    expected = [network.stem[:2](images), *[x := each(x) for each in network.stages]]
    for actual, wanted in zip(model.encode(images), expected, strict=True):
        assert_close(actual, wanted)
    (deepest,) = model.encode(images)[-1:]
    assert_close(network.classifier(deepest.mean((2, 3))), network(images), "logits")


def test_the_encoder_is_the_network_by_name_and_weight():
    """The network keeps its weights and shares them: pretraining it needs no conversion back."""
    network = OwnNetwork(2)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    model = spark_me.build_model(network, image_size=64, decoder_width=16)
    encoder = dict(model.encoder.named_parameters())
    assert encoder.keys() == before.keys() - {"classifier.weight", "classifier.bias"}
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]) and encoder.get(name, parameter) is parameter
    missing, unexpected = network.load_state_dict(model.encoder.state_dict(), strict=False)
    assert missing == ["classifier.weight", "classifier.bias"] and not unexpected
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 64, 64)).backward()
    optimizer.step()
    assert not torch.equal(network.stem[0].weight, before["stem.0.weight"])


def in_a_fork(function):
    """What a process of its own prints."""
    child = Child(function)
    assert child.wait() == 0, child.output
    return child.output


def register():
    spark_me.register_encoder("own", lambda in_channels, num_classes=None: OwnNetwork(3, in_channels, num_classes or 7))
    model = spark_me.build_model("own", image_size=(32, 48), in_channels=2, decoder_width=16)
    print(model.patch_size, *model.encoder.channels, "own" in spark_me.list_encoders())
    model(torch.randn(2, 2, 32, 48)).backward()
    for name in ("own", "resnet18", "timm/mine"):
        try:
            spark_me.register_encoder(name, OwnNetwork)
        except spark_me.UserError as error:
            print(error)


def test_a_registered_factory_is_known_by_name():
    """In a process of its own: the registry lasts as long as one."""
    first, *refusals = in_a_fork(register).splitlines()
    assert first == "16 8 8 16 32 True"
    taken = "own", "resnet18", "timm/mine"
    assert refusals == [f"encoder {name!r} exists already: register yours under another name" for name in taken]


def train_in_a_fork():
    model = spark_me.build_model(OwnNetwork(2), image_size=16, decoder_width=16)
    model(torch.randn(2, 3, 16, 16)).backward()
    child = os.fork()
    if not child:
        model(torch.randn(2, 3, 16, 16)).backward()
        os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has threads of autograd's own")
def test_a_fork_still_has_gradients():
    """Tracing must leave nothing behind by which autograd starts threads where there is no GPU."""
    assert in_a_fork(train_in_a_fork) == "7\n"


def test_a_factory_gets_the_channels_of_the_images(monkeypatch):
    monkeypatch.setattr("spark_me.networks._OWN", {})
    spark_me.register_encoder("own", lambda in_channels: OwnNetwork(2, in_channels))
    assert dense_network("own", in_channels=4).stem[0].in_channels == 4
