"""Any dense convnet as a sparse encoder, against its dense simulation in float64: maps, gradients, statistics."""

import copy
from collections.abc import Callable

import pytest
import torch
from timm.models import nfnet
from timm.models.nfnet import NormFreeNet
from torch import nn
from torchvision.models import ResNet
from torchvision.models.resnet import Bottleneck
from torchvision.models.vgg import make_layers

from spark_me import sparse
from spark_me.encoder import sparsify
from spark_me.errors import UserError
from spark_me.masked_dense import MaskedDense
from spark_me.networks import dense_network

NETWORKS = [
    "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "regnet_y_400mf", "convnext_tiny", "densenet121",
    "efficientnet_b0", "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "vgg16_bn", "googlenet",
    "timm/convnextv2_atto", "timm/resnet26d", "timm/resnetblur18", "timm/seresnet18", "timm/ecaresnet26t",
    "timm/resnetv2_50d_gn", "timm/regnetz_b16", "timm/dpn68", "timm/dla34", "timm/cspresnet50", "timm/ese_vovnet19b_dw",
    "timm/hgnetv2_b0", "timm/repvgg_a0", "timm/nf_regnet_b0", "timm/inception_next_atto", "timm/tf_efficientnet_b0",
    "timm/mobilenetv4_conv_small", "timm/mixnet_s", "timm/skresnet18", "timm/res2net50_14w_8s", "timm/dm_nfnet_f0",
]  # fmt: skip
SMALLER: dict[str, Callable[[], nn.Module]] = {
    "wide_resnet50_2": lambda: ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=24),  # of a width not its stages'
    "vgg16_bn": lambda: make_layers([32, "M", 64, "M", 64, 64, "M", 96, 96, "M", 96, 96, "M"], batch_norm=True),
    "timm/nf_regnet_b0": lambda: NormFreeNet(nfnet._nfreg_cfg([1, 1, 1, 1], (24, 48, 64, 96))),
    "timm/dm_nfnet_f0": lambda: NormFreeNet(nfnet._dm_nfnet_cfg([1, 1, 1, 1], (256, 256, 256, 256))),
}
"""How a smaller network is made of the same modules as the one of this name, which takes ten seconds."""
NOT_IN_ENGINE = {"googlenet", "timm/ese_vovnet19b_dw", "timm/hgnetv2_b0"}
"""Their pooling reads sites in an order that the engine has not."""
# everything, one corner, isolated patches that touch at corners and lie at borders
VISIBLE = torch.tensor([[[1, 1, 1], [1, 1, 1]], [[0, 0, 1], [0, 0, 0]], [[1, 0, 1], [0, 1, 0]]]).bool()


def randomised(name: str) -> nn.Module:
    """A network in float64 whose every parameter and statistic is random, and which drops nothing."""
    torch.manual_seed(0)
    network = SMALLER.get(name, lambda: dense_network(name))().double()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() <= 1 or isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
                nn.init.uniform_(parameter, 0.5, 1.5)
            elif parameter is not None and parameter.shape[1:].numel() == 1 and not isinstance(module, nn.Conv2d):
                nn.init.uniform_(parameter, 0.5, 1.5)  # layer scale
    return network.train()


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300)).item()


@pytest.mark.usefixtures("shallow", "one_thread")
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_simulation(name: str) -> None:
    network = randomised(name)
    native = sparsify(copy.deepcopy(network))
    simulation = MaskedDense(network, native.taps)
    images = torch.randn(3, 3, *(side * native.total_stride for side in VISIBLE.shape[1:]), dtype=torch.double)
    expected_images = images.clone().requires_grad_()
    expected = simulation(expected_images, VISIBLE)
    weights = [torch.randn_like(each) for each in expected]
    sum((x * w).sum() for x, w in zip(expected, weights)).backward()
    statistics = dict(network.named_buffers())
    gradients = {key: each.grad for key, each in network.named_parameters()}
    encoders = {"native": native}
    if name not in NOT_IN_ENGINE:
        encoders["minkowski"] = sparsify(randomised(name))
    for backend, encoder in encoders.items():
        own = images.clone().requires_grad_()
        pyramid = sparse.Pyramid(VISIBLE, encoder.total_stride, backend)
        maps = [sparse.to_dense(x) for x in encoder(sparse.to_sparse(own, pyramid))]
        sum((x * w).sum() for x, w in zip(maps, weights)).backward()
        for found, each in zip(maps, expected):
            assert difference(found, each) < 1e-9, backend
        assert difference(own.grad, expected_images.grad) < 1e-9
        largest = max(each.abs().max() for each in gradients.values() if each is not None)
        for key, parameter in encoder.named_parameters():
            # of parameters that a norm behind them cancels, the gradient is rounding alone
            scale = max(gradients[key].abs().max(), 1e-4 * largest)
            assert (parameter.grad - gradients[key]).abs().max() < 1e-9 * scale, (backend, key)
        for key, buffer in encoder.named_buffers():
            assert torch.allclose(buffer.double(), statistics[key].double(), rtol=1e-9, atol=1e-12), (backend, key)


class OfOneSize(nn.Module):
    """Made for one image size: in its classifier, or in the middle."""

    def __init__(self, positions: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU())
        self.positions = nn.Parameter(torch.zeros(1, 8, 16, 16)) if positions else None
        self.body = nn.Conv2d(8, 8, 2, 2)
        self.classifier = nn.Linear(8 * 8 * 8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        if self.positions is not None:
            x = x + self.positions
        return self.classifier(self.body(x).flatten(1))


def test_a_classifier_of_one_size_is_cut_off_and_nothing_else() -> None:
    assert sparsify(OfOneSize(positions=False)).strides == (4, 8)
    with pytest.raises(UserError, match=r"OfOneSize: add in its forward \(.*test_encoder.py, line \d+\): .*any size"):
        sparsify(OfOneSize(positions=True))
