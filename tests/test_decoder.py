import pytest
import torch
from conftest import randomise
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from spark_me.bench.workloads import plain_decode, plain_decode_block
from spark_me.decoder import ConvNeXtDecoder, Decoder, patch_loss, pays_off, upsample_and_convolve
from spark_me.errors import UserError
from spark_me.masking import patchify


@pytest.mark.parametrize("height, width", [(1, 1), (2, 3), (6, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_composed_upsampling_equals_the_two_layers(height, width, dtype, assert_close):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, height, width), (3, 4, 4, 4), (4,), (5, 4, 3, 3)]
    ours = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    theirs = [tensor.detach().clone().requires_grad_() for tensor in ours]
    actual = upsample_and_convolve(*ours)
    x, up_weight, up_bias, weight = theirs
    upsampled = functional.conv_transpose2d(x, up_weight, up_bias, stride=2, padding=1)
    expected = functional.conv2d(upsampled, weight, padding=1)
    assert_close(actual, expected, "output")
    upstream = torch.randn(expected.shape, generator=generator, dtype=dtype)
    actual.backward(upstream)
    expected.backward(upstream)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine.grad, other.grad, "gradient")


def test_composed_upsampling_gradcheck():
    shapes = [(1, 2, 2, 3), (2, 2, 4, 4), (2,), (2, 2, 3, 3)]
    assert torch.autograd.gradcheck(
        upsample_and_convolve, [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    )


def test_decoder_takes_both_paths_and_equals_the_plain_one(assert_close):
    decoder = randomise(Decoder(64, 32, 3)).double()
    maps = [torch.randn(4, width, 4 * 2**i, 3 * 2**i, dtype=torch.float64) for i, width in enumerate((64, 32, 16, 8))]
    assert not pays_off(maps[0], 64) and pays_off(maps[3], 8)
    mine, theirs = ([x.clone().requires_grad_() for x in maps] for _ in range(2))
    actual, expected = decoder(mine), plain_decode(decoder, theirs)
    assert actual.shape == (4, 3, 128, 96)
    assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    for ours, reference in zip(
        torch.autograd.grad(actual, [*mine, *decoder.parameters()], upstream),
        torch.autograd.grad(expected, [*theirs, *decoder.parameters()], upstream),
        strict=True,
    ):
        assert_close(ours, reference)


@pytest.mark.parametrize("channels", [1, 3])
def test_block_decoder_equals_the_plain_one(channels, assert_close):
    decoder = randomise(ConvNeXtDecoder(20, 16, channels)).double()
    x = torch.randn(2, 20, 3, 4, dtype=torch.float64)
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    actual, expected = decoder([mine]), plain_decode_block(decoder, theirs)
    assert actual.shape == (2, channels, 48, 64)
    assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    for ours, reference in zip(
        torch.autograd.grad(actual, [mine, *decoder.parameters()], upstream),
        torch.autograd.grad(expected, [theirs, *decoder.parameters()], upstream),
        strict=True,
    ):
        assert_close(ours, reference)


def test_block_decoder_orders_a_patch_as_targets_are():
    """Its output at a position is the patch itself: rows, columns, channels."""
    decoder = ConvNeXtDecoder(8, 4, 3)
    torch.nn.init.zeros_(decoder.prediction.weight)
    decoder.prediction.bias.data = torch.arange(48.0)
    patches = patchify(decoder([torch.randn(2, 8, 2, 3)]), 4)
    assert torch.equal(patches, torch.arange(48.0).expand(2, 6, 48))


def test_block_decoder_starts_as_convnext():
    decoder = ConvNeXtDecoder(64, 16, 3)
    for layer in (decoder.block.dwconv, decoder.block.pwconv1, decoder.block.pwconv2, decoder.prediction):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=5 / (2 * layer.weight.numel()) ** 0.5)
        assert not layer.bias.any()
    assert not decoder.block.grn.weight.any() and not decoder.block.grn.bias.any()
    assert (decoder.block.norm.weight == 1).all() and not decoder.block.norm.bias.any()


def test_patch_loss_is_the_mean_over_hidden_patches():
    prediction, target = torch.zeros(1, 3, 4), torch.tensor([[[1.0] * 4, [2.0] * 4, [3.0] * 4]])
    hidden = torch.tensor([[True, False, True]])
    assert patch_loss(prediction, target, hidden).item() == 5  # (1 + 9) / 2


def test_width_that_cannot_be_halved_is_refused():
    with pytest.raises(UserError, match="decoder_width=48 must be a multiple of 32"):
        Decoder(48, 32, 3)
    ConvNeXtDecoder(48, 32, 3)


class Convolutions(TorchDispatchMode):
    """Keeps the maps, and the kernels that are no parameters, of all convolutions of maps."""

    def __init__(self, decoder):
        super().__init__()
        self.parameters = {parameter.data_ptr() for parameter in decoder.parameters()}
        self.maps, self.composed = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default and args[0].dim() == 4:
            self.maps.append(args[0])
            self.composed += [args[1]] if args[1].data_ptr() not in self.parameters else []
        return func(*args, **kwargs or {})


def test_maps_and_composed_kernels_stay_channels_last():
    """As convolutions on GPUs want them: in another order, each would be copied again."""
    decoder = Decoder(64, 16, 3)
    maps = [torch.randn(18, 64 >> level, 4 << level, 4 << level) for level in range(4)]
    with Convolutions(decoder) as convolutions:
        decoder([each.contiguous(memory_format=torch.channels_last) for each in maps])
    assert (len(convolutions.maps), len(convolutions.composed)) == (10, 3)
    for tensor in convolutions.maps + convolutions.composed:
        assert tensor.is_contiguous(memory_format=torch.channels_last)
