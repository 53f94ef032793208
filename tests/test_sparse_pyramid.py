import pytest
import torch
from conftest import contract_masks

from spark_me import sparse
from spark_me.errors import EngineError
from spark_me.sparse.minkowski import ME
from spark_me.sparse.pyramid import require_engine_for


def canonical_sites(visible, patch_size, stride):
    """Image, then patch row-major, then position within the patch row-major: a plain loop."""
    sites = []
    for image, mask in enumerate(visible.tolist()):
        for row, flags in enumerate(mask):
            for column, flag in enumerate(flags):
                if flag:
                    corner_y, corner_x = row * patch_size, column * patch_size
                    for y in range(corner_y, corner_y + patch_size, stride):
                        sites += [[image, y, x] for x in range(corner_x, corner_x + patch_size, stride)]
    return sites


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_engine_keeps_the_canonical_order(visible, stride):
    pyramid = sparse.Pyramid(visible, 8)
    expected = canonical_sites(visible, 8, stride)
    assert pyramid.get_coordinates(pyramid.key(stride)).tolist() == expected
    assert pyramid.coordinates(stride).tolist() == expected
    assert pyramid.image_index(stride).tolist() == [site[0] for site in expected]


def test_strided_layers_reuse_the_inserted_sites(visible):
    pyramid = sparse.Pyramid(visible, 8)
    x = sparse.to_sparse(torch.randn(6, 2, 24, 32), pyramid)
    layers = sparse.Conv2d(2, 2, 3, 2, 1), sparse.MaxPool2d(3, 2, 1), sparse.Conv2d(2, 2, 1, 2)
    for layer, stride in zip(layers, (2, 4, 8)):
        x = layer(x)
        assert x.coordinate_map_key == pyramid.key(stride)
        assert x.C.tolist() == canonical_sites(visible, 8, stride)


@pytest.mark.parametrize("stride", [1, 4])
def test_dense_to_sparse_and_back(visible, stride):
    pyramid = sparse.Pyramid(visible, 8)
    side = 8 // stride
    dense = torch.randn(6, 3, 3 * side, 4 * side)
    x = sparse.to_sparse(dense, pyramid, stride)
    for row, (image, y, column) in enumerate(canonical_sites(visible, 8, stride)):
        assert torch.equal(x.F[row], dense[image, :, y // stride, column // stride])
    mask = visible.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]
    assert torch.equal(sparse.to_dense(x), dense * mask)
    fill = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(sparse.to_dense(x, fill), torch.where(mask, dense, fill[:, None, None]))


def test_fill_receives_the_gradient_of_empty_sites_only(visible):
    fill = torch.zeros(3, requires_grad=True)
    x = sparse.to_sparse(torch.randn(6, 3, 24, 32), sparse.Pyramid(visible, 8))
    sparse.to_dense(x, fill).sum().backward()
    hidden_sites = (~visible).sum().item() * 64
    assert fill.grad.tolist() == [hidden_sites] * 3


def test_hidden_last_patch_keeps_its_place():
    visible = torch.ones(1, 2, 2, dtype=torch.bool)
    visible[0, 1, 1] = False
    x = sparse.to_sparse(torch.ones(1, 1, 16, 16), sparse.Pyramid(visible, 8))
    assert sparse.to_dense(x).shape == (1, 1, 16, 16)


@pytest.mark.parametrize(
    "visible, problem",
    [
        (torch.ones(1, 2, 2), "must be bool"),
        (torch.ones(2, 2, dtype=torch.bool), "must be bool"),
        (torch.zeros(1, 2, 2, dtype=torch.bool), "at least one visible patch"),
        (torch.ones(0, 2, 2, dtype=torch.bool), "at least one image"),
    ],
)
def test_bad_masks_are_refused(visible, problem):
    with pytest.raises(ValueError, match=problem):
        sparse.Pyramid(visible, 8)


def test_maps_of_another_shape_are_refused(visible):
    with pytest.raises(ValueError, match=r"expected .6, C, 24, 32. at stride 1"):
        sparse.to_sparse(torch.randn(6, 3, 32, 24), sparse.Pyramid(visible, 8))


def test_with_features_keeps_the_sites(visible):
    x = sparse.to_sparse(torch.randn(6, 3, 24, 32), sparse.Pyramid(visible, 8))
    y = sparse.with_features(x, x.F[:, :1])
    assert y.coordinate_map_key == x.coordinate_map_key and y.F.shape[1] == 1


def test_unknown_backend_names_the_known_ones(visible):
    with pytest.raises(ValueError, match="choose one of native, minkowski"):
        sparse.Pyramid(visible, 8, backend="magic")


def test_contract_masks_are_what_they_claim():
    masks = contract_masks().flatten(1).sum(1)
    assert masks[0] == 12 and masks[1] == masks[2] == 1


def test_building_one_leaves_the_number_of_threads_alone(visible):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    sparse.Pyramid(visible, 8)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


class Counted(sparse.Pyramid):
    """Counts what is inserted into the engine."""

    inserted = 0

    def insert_and_map(self, *arguments):
        self.inserted += 1
        return super().insert_and_map(*arguments)


def test_the_native_backend_asks_the_engine_for_nothing(visible):
    pyramid = Counted(visible, 8, "native")
    dense = torch.randn(6, 2, 24, 32, requires_grad=True)
    x = sparse.to_sparse(dense, pyramid)
    for layer in (
        sparse.Conv2d(2, 2, 3, 2, 1),
        sparse.MaxPool2d(3, 2, 1),
        sparse.Conv2d(2, 2, 3, 1, 1),
        sparse.BatchNorm2d(2),
    ):
        x = layer(x)
    sparse.to_dense(x).sum().backward()
    assert pyramid.inserted == 0
    assert x.C.tolist() == canonical_sites(visible, 8, 4)
    assert pyramid.inserted == len(pyramid.strides)


def test_the_native_backend_runs_without_an_engine_for_its_device(visible):
    """The installed one may be built for the CPU: it is made when something asks for it."""
    pyramid = sparse.Pyramid(visible, 8, "native")
    sparse.Conv2d(2, 2, 3, 1, 1)(sparse.to_sparse(torch.randn(6, 2, 24, 32), pyramid))
    assert pyramid._engine_manager is None


@pytest.mark.parametrize("current, stream, built", [(0, "own", True), (0, "default", True), (1, "default", False)])
def test_what_the_engine_cannot_compute_is_refused(current, stream, built, monkeypatch):
    monkeypatch.setattr(ME, "is_cuda_available", lambda: built)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    message = "current GPU and its default stream" if built else "built for the CPU"
    with pytest.raises(EngineError, match=message):
        require_engine_for(torch.device("cuda", 1))
    if built:
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "default")
        require_engine_for(torch.device("cuda", current))


@pytest.mark.parametrize(
    "ask",
    [
        lambda pyramid: pyramid.size(pyramid.key(2)) == len(pyramid.coordinates(2)),
        lambda pyramid: torch.equal(pyramid.get_coordinates(4).long(), pyramid.coordinates(4)),
        lambda pyramid: pyramid.stride(pyramid.key(1), 8) == pyramid.key(8),
        lambda pyramid: len(pyramid.origin_map(pyramid.key(8))[1]) == len(pyramid.visible),
        lambda pyramid: len(pyramid.kernel_map(pyramid.key(1), pyramid.key(2), stride=2, kernel_size=2)) == 4,
        lambda pyramid: "CoordinateMapCPU:28x3" in repr(pyramid),
    ],
)  # fmt: skip
def test_whatever_asks_the_engine_first_finds_all_sites(ask, visible):
    pyramid = Counted(visible, 8, "native")
    assert ask(pyramid)
    assert pyramid.inserted == len(pyramid.strides)


def test_the_engines_own_layers_work_on_tensors_of_the_native_backend(visible, assert_close):
    """Convolution, its transpose back, and pooling, none of them ours, forward and backward."""
    stock = torch.nn.Sequential(
        ME.MinkowskiConvolution(2, 3, kernel_size=3, stride=2, dimension=2),
        ME.MinkowskiConvolutionTranspose(3, 2, kernel_size=2, stride=2, dimension=2),
        ME.MinkowskiSumPooling(kernel_size=2, stride=2, dimension=2),
    ).double()
    results = []
    for backend in sparse.BACKENDS:
        dense = torch.linspace(-1, 1, 6 * 2 * 24 * 32).double().view(6, 2, 24, 32).requires_grad_()
        x = sparse.to_sparse(dense, sparse.Pyramid(visible, 8, backend))
        if backend == "minkowski":
            assert x.C.tolist() == canonical_sites(visible, 8, 1)  # filled before the layers, as it used to be
        out = stock(x)
        out.F.square().sum().backward()
        results.append((out.F, dense.grad))
    for one, other in zip(*results):
        assert_close(one, other)


def test_an_engine_that_reorders_is_refused(visible):
    class Reordering(sparse.Pyramid):
        def insert_and_map(self, *arguments):
            key, (kept_rows, inverse) = super().insert_and_map(*arguments)
            return key, (kept_rows.flip(0), inverse)

    x = sparse.to_sparse(torch.randn(6, 2, 24, 32), Reordering(visible, 8))
    with pytest.raises(EngineError, match="reordered the sites of stride 1"):
        sparse.Conv2d(2, 2, 3, 1, 1)(x)


def test_features_may_be_elsewhere_than_the_mask(visible):
    pyramid = sparse.Pyramid(visible, 8, "native", device="meta")
    x = sparse.to_sparse(torch.empty(6, 3, 24, 32, device="meta"), pyramid)
    assert x.F.shape == (len(canonical_sites(visible, 8, 1)), 3) and x.F.device.type == "meta"
    assert sparse.to_dense(x).shape == (6, 3, 24, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_gpu_engine_keeps_the_canonical_order(device, visible):
    pyramid = sparse.Pyramid(visible.to(device), 8, device="cuda")
    for stride in pyramid.strides:
        expected = canonical_sites(visible, 8, stride)
        assert pyramid.get_coordinates(pyramid.key(stride)).tolist() == expected
        assert pyramid.coordinates(stride).tolist() == expected
