import pytest
import torch

from spark_me import masking
from spark_me.errors import UserError


def test_every_image_keeps_the_same_number_of_patches_and_hides_the_rest():
    visible = masking.draw_visible(64, (7, 7), 0.6)
    assert visible.dtype == torch.bool and visible.shape == (64, 7, 7)
    assert visible.flatten(1).sum(1).eq(20).all()
    assert len({tuple(mask.flatten().tolist()) for mask in visible}) > 60  # images differ


def test_every_patch_is_drawn_equally_often():
    visible = masking.draw_visible(4000, (2, 3), 0.5, generator=torch.Generator().manual_seed(0))
    share = visible.float().mean(0)
    assert (share - 0.5).abs().max() < 0.04  # five standard deviations


def test_generator_decides_the_mask():
    first = masking.draw_visible(3, (7, 7), 0.6, generator=torch.Generator().manual_seed(1))
    again = masking.draw_visible(3, (7, 7), 0.6, generator=torch.Generator().manual_seed(1))
    other = masking.draw_visible(3, (7, 7), 0.6, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_masks_of_samples_depend_on_seed_epoch_and_sample_alone():
    together = masking.draw_visible_of_samples(0, 3, [5, 6, 7], (7, 7), 0.6)
    alone = masking.draw_visible_of_samples(0, 3, [6], (7, 7), 0.6)
    assert torch.equal(together[1], alone[0])
    for seed, epoch, sample in [(1, 3, 6), (0, 4, 6), (0, 3, 7)]:
        other = masking.draw_visible_of_samples(seed, epoch, [sample], (7, 7), 0.6)
        assert not torch.equal(other, alone)


@pytest.mark.parametrize("grid, ratio, kept", [((7, 7), 0.6, 20), ((12, 12), 0.75, 36), ((3, 4), 0.6, 5)])
def test_count_visible(grid, ratio, kept):
    assert masking.count_visible(grid, ratio) == kept


@pytest.mark.parametrize("ratio, problem", [(0.0, "hides no patch"), (1.0, "leaves no patch"), (0.009, "hides no")])
def test_count_visible_refuses(ratio, problem):
    with pytest.raises(UserError, match=problem):
        masking.count_visible((7, 7), ratio)


def test_patchify_cuts_row_major_with_channels_fastest():
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = masking.patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for patch in range(6):
        row, column = divmod(patch, 3)
        block = images[1, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(patches[1, patch], block.permute(1, 2, 0).flatten())


def test_unpatchify_undoes_patchify():
    images = torch.randn(2, 5, 96, 64)
    assert torch.equal(masking.unpatchify(masking.patchify(images, 32), (3, 2), 32), images)


def test_upsample_visible_repeats_each_flag():
    visible = torch.tensor([[[True, False]]])
    assert masking.upsample_visible(visible, 2).tolist() == [[[True, True, False, False]] * 2]


@pytest.mark.parametrize("size", [(100, 64), (64, 31), (0, 64)])
def test_grid_of_refuses_sizes_that_do_not_fit(size):
    with pytest.raises(UserError, match="no multiple of the encoder's patch size 32: the nearest that fits is"):
        masking.grid_of(size, 32)
