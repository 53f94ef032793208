"""The exactness contract: the sparse model equals the masked-dense simulation of the same weights."""

from functools import cache

import pytest
import torch
from conftest import names_in_simulation, randomise

import spark_me
from spark_me.bench.workloads import MaskedDenseSparK
from spark_me.networks import dense_network
from spark_me.trace import trace


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters()}


def buffers(module):
    return {name: b for name, b in module.named_buffers() if not name.endswith("num_batches_tracked")}


def twins(name, dtype, drop_path=0.0, in_channels=3, backend="minkowski", decoder="unet"):
    model = spark_me.build_model(
        name,
        image_size=(96, 128),
        decoder=decoder,
        decoder_width=32,
        drop_path=drop_path,
        in_channels=in_channels,
        backend=backend,
    )
    model = randomise(model).to(dtype)
    network = dense_network(name, in_channels, drop_path=drop_path)
    oracle = MaskedDenseSparK(trace(network, in_channels), in_channels, decoder_width=32, decoder=decoder).to(dtype)
    oracle.load_state_dict({**oracle.state_dict(), **names_in_simulation(model.state_dict())})
    return model, oracle


# Stochastic depth draws in the same order in ResNets; other libraries' modules draw in their own ways.
@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    "name, drop_path, decoder",
    [
        ("resnet18", 0.3, "unet"),
        ("resnet50", 0.3, "unet"),
        ("convnextv2_atto", 0.0, "unet"),
        ("timm/seresnet18", 0.0, "unet"),
        ("timm/test_efficientnet", 0.0, "unet"),
        ("densenet121", 0.0, "unet"),
        ("resnet18", 0.3, "block"),
        ("convnextv2_atto", 0.0, "block"),
    ],
)
def test_loss_gradients_and_statistics_equal_the_simulation(name, drop_path, decoder, backend, visible, assert_close):
    model, oracle = twins(name, torch.float64, drop_path=drop_path, backend=backend, decoder=decoder)
    images = torch.randn(len(visible), 3, 96, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    torch.manual_seed(7)  # stochastic depth draws in the same order
    loss = model(ours, visible)
    torch.manual_seed(7)
    expected = oracle(theirs, visible)
    assert_close(loss, expected, "loss")
    loss.backward()
    expected.backward()
    assert_close(ours.grad, theirs.grad, "gradient of the images")
    theirs_gradients = gradients(oracle)
    largest = max(gradient.abs().max() for gradient in theirs_gradients.values() if gradient is not None)
    for key, gradient in names_in_simulation(gradients(model)).items():
        # of parameters that a norm behind them cancels, the gradient is rounding alone
        scale = max(theirs_gradients[key].abs().max(), 1e-4 * largest)
        assert (gradient - theirs_gradients[key]).abs().max() < 1e-9 * scale, f"gradient of {key}"
    statistics = dict(oracle.named_buffers())
    for key, statistic in names_in_simulation(buffers(model)).items():
        assert_close(statistic, statistics[key], key)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("decoder", ["unet", "block"])
def test_loss_float32(decoder, backend, visible, assert_close):
    model, oracle = twins("resnet18", torch.float32, backend=backend, decoder=decoder)
    images = torch.randn(len(visible), 3, 96, 128, generator=torch.Generator().manual_seed(1))
    assert_close(model(images, visible), oracle(images, visible))


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("decoder", ["unet", "block"])
@pytest.mark.parametrize("in_channels", [1, 4])
def test_other_channel_counts(in_channels, decoder, visible, assert_close):
    model, oracle = twins("resnet18", torch.float64, in_channels=in_channels, decoder=decoder)
    images = torch.randn(len(visible), in_channels, 96, 128, dtype=torch.float64)
    assert_close(model(images, visible), oracle(images, visible))
    assert_close(model.predict(images, visible), oracle.predict(images, visible))


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("training", [True, False])
def test_four_feature_scales_equal_the_simulation(training, backend, visible, assert_close):
    model, oracle = twins("resnet50", torch.float64, backend=backend)
    model.train(training), oracle.train(training)
    images = torch.randn(len(visible), 3, 96, 128, dtype=torch.float64)
    for ours, theirs in zip(model.encode(images, visible), oracle.encoder(images, visible), strict=True):
        assert_close(ours, theirs)


def test_encode_without_mask_is_the_plain_torchvision_network(assert_close):
    torchvision = pytest.importorskip("torchvision")
    model, _ = twins("resnet18", torch.float64)
    network = torchvision.models.resnet18(weights=None).double()
    state = {k.removeprefix("encoder."): v for k, v in model.state_dict().items() if k.startswith("encoder.")}
    missing = network.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    model.eval(), network.eval()
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    for ours, layer in zip(model.encode(images), ("layer1", "layer2", "layer3", "layer4"), strict=True):
        x = getattr(network, layer)(x)
        assert_close(ours, x, layer)


@pytest.mark.parametrize("width, parameters", [(512, 37_970_611), (768, 52_921_835)])
def test_published_parameter_counts(width, parameters):
    model = spark_me.build_model("resnet50", decoder_width=width)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.encoder.parameters()) == 23_508_032


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("decoder", ["unet", "block"])
def test_hidden_pixels_never_reach_the_prediction(decoder, visible):
    model, _ = twins("resnet18", torch.float32, decoder=decoder)
    images = torch.randn(len(visible), 3, 96, 128)
    hidden = ~visible.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    disturbed = torch.where(hidden, torch.full_like(images, 1e6), images)
    assert torch.equal(model.predict(images, visible), model.predict(disturbed, visible))


@pytest.mark.usefixtures("shallow")
def test_black_visible_pixels_are_sites(assert_close):
    model, oracle = twins("resnet18", torch.float64)
    images = torch.zeros(2, 3, 96, 128, dtype=torch.float64)
    visible = torch.ones(2, 3, 4, dtype=torch.bool)
    visible[:, 0] = False
    assert_close(model(images, visible), oracle(images, visible))


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("decoder, last", [("unet", "projection"), ("block", "prediction")])
def test_predicting_nothing_scores_one(decoder, last):
    model, _ = twins("resnet18", torch.float32, decoder=decoder)
    torch.nn.init.zeros_(model.decoder.get_submodule(last).weight)
    torch.nn.init.zeros_(model.decoder.get_submodule(last).bias)
    assert model(torch.randn(4, 3, 96, 128)).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.usefixtures("shallow")
def test_draws_a_mask_of_the_configured_ratio():
    model, _ = twins("resnet18", torch.float32)
    out = model.reconstruct(torch.randn(2, 3, 96, 128))
    assert out.visible.flatten(1).sum(1).tolist() == [5, 5]  # round(12 · 0.4)
    torch.manual_seed(0)
    first = model(torch.ones(2, 3, 96, 128).normal_(generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(1)
    second = model(torch.ones(2, 3, 96, 128).normal_(generator=torch.Generator().manual_seed(0)))
    assert first != second


@pytest.mark.usefixtures("shallow")
def test_reconstruction_is_in_image_units(visible, assert_close):
    """A decoder that outputs the normalised target itself must give the image back."""
    model, _ = twins("resnet18", torch.float64)
    images = torch.rand(len(visible), 3, 96, 128, dtype=torch.float64) * 200 + 20
    mean = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 32)
    centred = images - mean.repeat_interleave(32, 2).repeat_interleave(32, 3)
    variance = torch.nn.functional.avg_pool2d(centred.square().mean(1, keepdim=True), 32) * (3072 / 3071)
    deviation = (variance + 1e-6).sqrt().repeat_interleave(32, 2).repeat_interleave(32, 3)
    model.predict = lambda *_: centred / deviation
    out = model.reconstruct(images, visible)
    assert_close(out.prediction, images)
    assert out.loss.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("decoder", ["unet", "block"])
def test_two_runs_with_one_seed_are_bitwise_equal(decoder, backend):
    def run():
        torch.manual_seed(0)
        model = spark_me.build_model(
            "resnet18", image_size=(64, 96), decoder=decoder, decoder_width=32, drop_path=0.2, backend=backend
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 3, 64, 96)).backward()
            optimizer.step()
        return model.state_dict()

    first, second = run(), run()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("decoder", ["unet", "block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_float64(dtype, decoder, backend, visible):
    model, oracle = twins("resnet18", torch.float32, backend=backend, decoder=decoder)
    images = torch.randn(len(visible), 3, 96, 128)
    with torch.autocast("cpu", dtype=dtype):
        loss = model(images, visible)
    expected = oracle.double()(images.double(), visible)
    assert abs(loss.item() / expected.item() - 1) < 1e-2
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


METHODS = ["forward", "encode", "reconstruct"]


@cache
def refusing(encoder, backend):
    """A model that is refused its input, and stays as it is."""
    return spark_me.build_model(encoder, image_size=(96, 128), decoder_width=32, backend=backend)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("encoder", ["resnet18", "convnextv2_atto"])
def test_a_batch_without_images_is_refused(encoder, method, backend):
    compute = getattr(refusing(encoder, backend), method)
    images, visible = torch.randn(0, 3, 96, 128), torch.ones(0, 3, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="a batch needs at least one image"):
        compute(images)
    with pytest.raises(ValueError, match="a batch needs at least one image"):
        compute(images, visible)
    if method != "encode":
        with pytest.raises(ValueError, match="a batch needs at least one image"):
            compute(images, valid=visible)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("images", [1, 3])
def test_an_image_of_which_nothing_is_visible_is_refused(images, method, backend):
    compute = getattr(refusing("resnet18", backend), method)
    visible = torch.ones(images, 3, 4, dtype=torch.bool)
    visible[-1] = False
    with pytest.raises(ValueError, match="every image needs at least one visible patch"):
        compute(torch.randn(images, 3, 96, 128), visible)


@pytest.mark.parametrize("size", [(100, 96), (96, 0)])
def test_sizes_that_do_not_fit_are_refused(size):
    with pytest.raises(spark_me.UserError, match="multiple of the encoder's patch size 32"):
        spark_me.build_model("resnet18", image_size=size)


@pytest.mark.parametrize("ratio, problem", [(0.01, "hides no patch"), (0.99, "leaves no patch visible")])
def test_masks_that_hide_all_or_nothing_are_refused(ratio, problem):
    with pytest.raises(spark_me.UserError, match=problem):
        spark_me.build_model("resnet18", image_size=(96, 96), mask_ratio=ratio)


def test_unknown_encoder_names_the_nearest():
    with pytest.raises(spark_me.UserError, match="did you mean resnet50"):
        spark_me.build_model("resnet5")


def test_decoders_and_widths_that_do_not_fit_are_refused():
    with pytest.raises(spark_me.UserError, match="multiple of 32"):
        spark_me.build_model("resnet18", decoder_width=100)
    with pytest.raises(spark_me.UserError, match="decoder_width=0 must be positive"):
        spark_me.build_model("resnet18", decoder="block", decoder_width=0)
    with pytest.raises(spark_me.UserError, match="decoder=linear: must be one of unet, block"):
        spark_me.build_model("resnet18", decoder="linear")


def test_the_block_decoder_asks_for_the_deepest_scale_alone():
    """Beside the encoder there are FCMAE's projection, mask token, block and linear layer, at any width."""
    for width in (512, 100):
        model = spark_me.build_model("convnextv2_atto", decoder="block", decoder_width=width)
        channels, pixels = 320, 32 * 32 * 3
        block = (
            49 * width + width + 2 * width + 4 * width * width + 2 * 4 * width + 4 * width + 4 * width * width + width
        )
        beside = (channels + 1) * width + width + block + (width + 1) * pixels
        encoder = sum(p.numel() for p in model.encoder.parameters())
        assert sum(p.numel() for p in model.parameters()) - encoder == beside
        assert [tuple(p.shape) for p in model.densify.parameters()] == [
            (1, width, 1, 1),
            (width, channels, 1, 1),
            (width,),
        ]
        assert [x.shape[1] for x in model.encode(torch.randn(1, 3, 64, 64))] == [40, 80, 160, 320]  # encode is as ever


@pytest.mark.usefixtures("shallow")
def test_residual_branches_start_at_zero_or_open():
    for name, norm in (("resnet18", "bn2"), ("resnet50", "bn3")):
        closed = spark_me.build_model(name, decoder_width=32).encoder.state_dict()
        opened = spark_me.build_model(name, decoder_width=32, zero_init_residual=False).encoder.state_dict()
        last = {key for key in closed if key.startswith("layer") and key.endswith(f"{norm}.weight")}
        assert last and all((closed[key] == 0).all() and (opened[key] == 1).all() for key in last)
        others = {key for key in closed if key.endswith(".weight") and "bn" in key} - last
        assert all((closed[key] == 1).all() and (opened[key] == 1).all() for key in others)
        as_mmpretrain = spark_me.build_model(name, decoder_width=32, init="mmpretrain").encoder.state_dict()
        assert all((as_mmpretrain[key] == 1).all() for key in last)
        closed = spark_me.build_model(name, decoder_width=32, init="mmpretrain", zero_init_residual=True).encoder
        assert all((closed.state_dict()[key] == 0).all() for key in last)
    spark_me.build_model("convnextv2_atto", decoder_width=32, init="mmpretrain")  # has none, and is asked for none
    with pytest.raises(spark_me.UserError, match="init=timm: must be one of official, mmpretrain"):
        spark_me.build_model("resnet18", init="timm")
    with pytest.raises(spark_me.UserError, match="convnextv2_atto starts no residual branch at zero"):
        spark_me.build_model("convnextv2_atto", decoder_width=32, zero_init_residual=False)
