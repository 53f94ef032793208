"""Groups of layers against tables written by hand from the published grouping."""

import math

import pytest
import torch
from torch import nn

from spark_me.dense import build_network
from spark_me.downstream.layer_decay import LayerDecay
from spark_me.train.schedules import parameter_groups

BLOCKS = ("BasicBlock", "Bottleneck", "CNBlock", "ConvNeXtBlock")
# Of some parameters, the exponent of the decay: how many groups they are away from the classifier.
RESNET50 = {
    "conv1.weight": 7,
    "bn1.bias": 7,
    "layer1.0.conv1.weight": 6,
    "layer1.2.bn3.weight": 6,
    "layer2.0.downsample.0.weight": 5,
    "layer2.1.conv2.weight": 5,
    "layer2.2.conv2.weight": 4,
    "layer2.3.bn2.bias": 4,
    "layer3.0.conv1.weight": 3,
    "layer3.2.conv1.weight": 3,
    "layer3.3.conv1.weight": 2,
    "layer3.5.conv3.weight": 2,
    "layer4.0.conv1.weight": 1,
    "layer4.2.bn3.bias": 1,
    "fc.weight": 0,
    "fc.bias": 0,
}
RESNET101 = {"conv1.weight": 13, "layer3.0.bn1.weight": 9, "layer3.22.bn1.weight": 2, "layer4.0.bn1.weight": 1}
RESNET152 = {"conv1.weight": 14, "layer2.3.bn1.weight": 12, "layer2.4.bn1.weight": 11, "layer3.35.bn1.weight": 2}
RESNET200 = {"conv1.weight": 18, "layer2.23.bn1.weight": 11, "layer3.0.bn1.weight": 10, "layer4.2.bn1.weight": 1}
CONVNEXT_SMALL = {
    "features.0.0.weight": 13,
    "features.1.0.block.0.weight": 12,
    "features.2.1.weight": 11,
    "features.3.2.layer_scale": 11,
    "features.4.0.weight": 10,
    "features.5.2.block.3.weight": 10,
    "features.5.3.block.3.weight": 9,
    "features.5.26.block.5.bias": 2,
    "features.6.1.weight": 1,
    "features.7.0.block.0.weight": 1,
    "classifier.0.weight": 0,
    "classifier.2.weight": 0,
}
CONVNEXTV2_TINY = {
    "stem.0.weight": 7,
    "stages.0.blocks.2.conv_dw.weight": 6,
    "stages.1.downsample.1.weight": 5,
    "stages.1.blocks.0.mlp.grn.weight": 5,
    "stages.2.downsample.0.weight": 4,
    "stages.2.blocks.2.norm.weight": 4,
    "stages.2.blocks.3.norm.weight": 3,
    "stages.2.blocks.8.norm.weight": 2,
    "stages.3.downsample.1.weight": 1,
    "stages.3.blocks.1.norm.weight": 1,
    "head.norm.weight": 0,
    "head.fc.weight": 0,
}
TABLES = {
    "resnet50": RESNET50,
    "resnet101": RESNET101,
    "resnet152": RESNET152,
    "resnet200": RESNET200,
    "convnext_small": CONVNEXT_SMALL,
    "convnextv2_tiny": CONVNEXTV2_TINY,
}


def empty(encoder: str) -> nn.Module:
    """A network without values: its layers' names and shapes decide."""
    with torch.device("meta"):
        return build_network(encoder, 10)


@pytest.mark.parametrize("encoder", TABLES)
def test_shares_of_the_learning_rate(encoder: str) -> None:
    decay = LayerDecay(empty(encoder), 0.7)
    for name, exponent in TABLES[encoder].items():
        assert decay.scale(name) == pytest.approx(0.7**exponent, rel=1e-12), name


@pytest.mark.parametrize(
    "encoder",
    ["resnet18", "resnet50", "convnext_small", "convnextv2_tiny", "convnextv2_atto", "densenet121", "timm/regnety_002"],
)
def test_every_parameter_is_in_one_group_and_deeper_ones_learn_faster(encoder: str) -> None:
    network = empty(encoder)
    decay = LayerDecay(network, 0.8)
    shares = {name: decay.scale(name) for name, _ in network.named_parameters()}
    groups = [decay.last - round(math.log(share, 0.8)) for share in shares.values()]
    assert sorted(groups) == groups  # parameters come in the order of the layers
    assert set(groups) == set(range(decay.last + 1)) - ({5} if encoder == "convnextv2_atto" else set())
    listed = parameter_groups(network, decay.scale)
    assert sum(len(group["params"]) for group in listed) == len(groups)
    assert len({(group["decayed"], group["lr_scale"]) for group in listed}) == len(listed)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    matrices = {
        f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    for group in listed:
        for parameter in group["params"]:
            assert decay.scale(names[id(parameter)]) == group["lr_scale"]
            assert (names[id(parameter)] in matrices) == group["decayed"], names[id(parameter)]


def test_other_networks_are_grouped_by_stage_and_block() -> None:
    """VGG-16 has no blocks of its own: three convolutions each, by stages that begin at strides 4, 8, …"""
    decay = LayerDecay(empty("vgg16_bn"), 0.5)
    convolutions = [f"features.{place}.weight" for place in (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)]
    groups = [decay.last - round(math.log(decay.scale(name), 0.5)) for name in convolutions]
    assert groups == [0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert decay.scale("classifier.6.weight") == 1


@pytest.mark.parametrize("encoder", ["resnet18", "resnet50", "convnext_tiny", "convnextv2_atto"])
def test_dropped_branches_leave_the_shortcut(encoder: str) -> None:
    # the last block is as good as always dropped, the first never
    network = build_network(encoder, 4, drop_path=1.0 - 1e-7).train()
    blocks = [module for module in network.modules() if type(module).__name__ in BLOCKS]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    torch.manual_seed(0)
    images = torch.randn(3, 3, 64, 64)
    network(images)
    (before, after) = seen.pop()
    expected = before.relu() if encoder.startswith("resnet") else before
    torch.testing.assert_close(after, expected)
    network.eval()
    plain = build_network(encoder, 4).eval()
    plain.load_state_dict(network.state_dict())
    torch.testing.assert_close(network(images), plain(images))


def test_probability_grows_linearly_over_the_blocks() -> None:
    network = build_network("convnext_tiny", 4, drop_path=0.34)
    rates = [module.stochastic_depth.p for module in network.modules() if type(module).__name__ in BLOCKS]
    assert rates == pytest.approx([0.02 * block for block in range(18)], abs=1e-6)
    resnet = build_network("resnet50", 4, drop_path=0.3).train()
    # A branch that is kept is scaled by 1 / (1 − p): its mean over many images stays.
    torch.manual_seed(0)
    norm = resnet.layer4[2].bn3
    nn.init.constant_(norm.bias, 1.0)
    output = norm(torch.randn(4000, 2048, 1, 1))
    kept = output.flatten(1).abs().sum(dim=1) > 0
    assert 1 - kept.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert output[kept].mean().item() == pytest.approx(1 / 0.7, rel=1e-3)
