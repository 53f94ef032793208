"""Sums over the sites of each image against a gather loop over images."""

import pytest
import torch

from spark_me import sparse
from spark_me.sparse import images

PATCH = 8


def rows_at(pyramid, stride, channels=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(stride)
    rows = torch.randn(pyramid.neighbours.sites(stride), channels, generator=generator, dtype=torch.float64)
    return rows.to(dtype).requires_grad_()


def image_of_row(visible, stride):
    """Image of every row, by counting: canonical order keeps an image's rows together."""
    counts = visible.flatten(1).sum(1) * (PATCH // stride) ** 2
    return torch.tensor([image for image, count in enumerate(counts.tolist()) for _ in range(count)])


@pytest.mark.parametrize("stride", [1, 4, 8])
def test_sum_and_mean_over_images(stride, visible, assert_close):
    pyramid = sparse.Pyramid(visible, PATCH)
    rows, image = rows_at(pyramid, stride), image_of_row(visible, stride)
    parts = [rows.detach()[image == number] for number in range(len(visible))]
    assert_close(sparse.sum_over_images(rows, pyramid, stride), torch.stack([part.sum(0) for part in parts]))
    assert_close(sparse.mean_over_images(rows, pyramid, stride), torch.stack([part.mean(0) for part in parts]))


@pytest.mark.parametrize("stride", [1, 4, 8])
def test_spread_gives_every_site_its_images_values(stride, visible):
    pyramid = sparse.Pyramid(visible, PATCH)
    of_images = torch.randn(len(visible), 3)
    assert torch.equal(sparse.spread_over_sites(of_images, pyramid, stride), of_images[image_of_row(visible, stride)])


@pytest.mark.parametrize("stride", [4, 8])
def test_gradcheck(stride, visible):
    pyramid = sparse.Pyramid(visible, PATCH)
    of_images = torch.randn(len(visible), 3, dtype=torch.float64, requires_grad=True)
    for function, operand in [
        (sparse.sum_over_images, rows_at(pyramid, stride)),
        (sparse.mean_over_images, rows_at(pyramid, stride)),
        (sparse.spread_over_sites, of_images),
    ]:
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, pyramid, stride), (operand,))
        assert torch.autograd.gradgradcheck(lambda x, f=function: f(x, pyramid, stride), (operand,))


@pytest.mark.parametrize("stride", [2, 8])
def test_scale_images(stride, visible, assert_close):
    pyramid = sparse.Pyramid(visible, PATCH)
    rows, factors = rows_at(pyramid, stride), torch.randn(len(visible), 3, dtype=torch.float64, requires_grad=True)
    expected = rows.detach() * factors.detach()[image_of_row(visible, stride)]
    assert_close(images.scale_images(rows, factors, pyramid, stride), expected)
    assert torch.autograd.gradcheck(lambda *x: images.scale_images(*x, pyramid, stride), (rows, factors))


def test_global_average(visible, assert_close):
    x = sparse.to_sparse(torch.randn(6, 3, 12, 16, dtype=torch.float64), sparse.Pyramid(visible, PATCH), 2)
    image = image_of_row(visible, 2)
    assert_close(sparse.global_average(x), torch.stack([x.F[image == number].mean(0) for number in range(6)]))


@pytest.mark.parametrize("part_bytes", [1, 2**30])
def test_sum_of_products_whatever_the_size_of_a_part(part_bytes, visible, monkeypatch, assert_close):
    monkeypatch.setattr(images, "PART_BYTES", part_bytes)
    pyramid = sparse.Pyramid(visible, PATCH)
    x, y = rows_at(pyramid, 2).detach(), rows_at(pyramid, 2).detach().flip(1)
    blocks = (images.patch_blocks(rows, pyramid, 2) for rows in (x, y))
    image = image_of_row(visible, 2)
    expected = torch.stack([(x * y)[image == number].sum(0) for number in range(len(visible))])
    assert_close(images.sum_products_over_images(*blocks, pyramid), expected)


def test_half_precision_is_summed_in_float32():
    pyramid = sparse.Pyramid(torch.ones(1, 2, 2, dtype=torch.bool), PATCH)
    rows = torch.full((256, 1), 300.0, dtype=torch.float16)  # the sum and every square exceed 65504
    assert sparse.sum_over_images(rows, pyramid, 1).item() == 300 * 256
    blocks = images.patch_blocks(rows, pyramid, 1)
    assert images.sum_products_over_images(blocks, blocks, pyramid).item() == 90000 * 256
