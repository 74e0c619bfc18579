"""Grids: every pixel where it belongs, texts where they can be read."""

import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image

from scale import checkpoints, grids

M = grids.MARGIN


def images(n: int, channels: int = 3, height: int = 5, width: int = 7) -> torch.Tensor:
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(n))


def cell(sheet: Image.Image, row: int, column: int, height: int, width: int, below: int = 0) -> np.ndarray:
    top, left = M + row * (height + below + M), M + column * (width + M)
    return np.asarray(sheet)[top : top + height, left : left + width]


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_is_where_it_belongs(channels, scale):
    x = images(5, channels)
    sheet = grids.grid(x, columns=2, scale=scale)
    height, width = 5 * scale, 7 * scale
    assert sheet.mode == "RGB"
    assert sheet.size == (2 * width + 3 * M, 3 * height + 4 * M)
    for i in range(5):
        for y in range(5):
            for z in range(7):
                value = np.rint(255 * x[i, :, y, z].double().numpy())
                square = cell(sheet, i // 2, i % 2, height, width)[
                    y * scale : (y + 1) * scale, z * scale : (z + 1) * scale
                ]
                assert (square == value).all()
    inked = (np.asarray(sheet) != 255).any(-1)
    for i in range(5):
        cell_of = cell(sheet, i // 2, i % 2, height, width)
        inked[M + (i // 2) * (height + M) :][:height, M + (i % 2) * (width + M) :][:, :width] = False
        assert cell_of.shape == (height, width, 3)
    assert not inked.any()  # margins and the empty place are white


def test_values_are_rounded_not_cut():
    x = torch.tensor([0.0, 1.0, 0.999, 0.5 / 255 + 1e-6]).reshape(4, 1, 1, 1)
    sheet = np.asarray(grids.grid(x, columns=4, scale=1))
    assert [int(sheet[M, M + i * (1 + M), 0]) for i in range(4)] == [0, 255, 255, 1]


@pytest.mark.parametrize(("side", "enlarged"), [(8, 96), (28, 112), (64, 128), (96, 96), (512, 512)])
def test_small_images_are_enlarged_by_whole_factors_and_large_ones_kept(side, enlarged):
    assert grids.grid(images(1, 1, side, side)).size == (enlarged + 2 * M, enlarged + 2 * M)


@pytest.mark.parametrize(("n", "shape"), [(1, (1, 1)), (2, (2, 1)), (5, (3, 2)), (9, (3, 3)), (10, (4, 3))])
def test_the_default_is_the_squarest_grid(n, shape):
    columns, rows = shape
    assert grids.grid(images(n), scale=1).size == (columns * (7 + M) + M, rows * (5 + M) + M)


def test_numpy_half_precision_and_gradients_are_taken():
    x = images(2).half()
    expected = np.asarray(grids.grid(x.float()))
    constant = x.numpy()
    constant.flags.writeable = False
    for same in (x, constant, x.float().requires_grad_()):
        assert np.array_equal(np.asarray(grids.grid(same)), expected)


def test_captions_stand_below_their_images_and_inside_the_width():
    x = torch.zeros(4, 1, 8, 8)
    captions = ["", "W", "a long prompt " * 10, "line\nbreak"]
    sheet = grids.grid(x, columns=2, captions=captions)
    below = grids.CAPTION + 4
    strips = []
    for i in range(4):
        assert (cell(sheet, i // 2, i % 2, 96, 96, below) == 0).all()
        top, left = M + (i // 2) * (96 + below + M) + 96, M + (i % 2) * (96 + M)
        strips.append(np.asarray(sheet)[top : top + below, left : left + 96])
    assert [(strip < 100).any() for strip in strips] == [False, True, True, True]
    inked = np.asarray(sheet).min(-1) < 255
    assert not inked[:, :M].any()
    assert not inked[:, -M:].any()
    assert not inked[:, M + 96 : 2 * M + 96].any()  # no text runs into the neighbour
    assert not inked[-M:].any()
    assert not np.array_equal(strips[1], strips[2])


def test_captions_have_glyphs_for_accents():
    """A letter that the font lacks is drawn as the same box as any other."""
    drawn = [np.asarray(grids.grid(torch.zeros(1, 1, 8, 8), captions=[c]))[M + 96 :].tobytes() for c in ("é", "ü", "θ")]
    assert len(set(drawn)) == 3


def test_before_and_after_stand_side_by_side_each_image_with_its_reward():
    before, after = images(3, 1, 8, 8), images(4, 1, 8, 8)[:3]
    sheet = grids.before_after(before, after, columns=3, scale=12)
    left, right = (np.asarray(grids.grid(x, columns=3, scale=12)) for x in (before, after))
    found = np.asarray(sheet)
    top = sheet.height - left.shape[0]
    assert np.array_equal(found[top:, : left.shape[1]], left)
    assert np.array_equal(found[top:, -right.shape[1] :], right)
    for half in (found[:top, : left.shape[1]], found[:top, -right.shape[1] :]):
        assert (half < 50).any()  # a title
    rewarded = grids.before_after(before, after, columns=3, scale=12, rewards=([0.1, 2, -3], [4, 5, float("nan")]))
    captioned = np.asarray(grids.grid(after, 3, 12, ["4", "5", "nan"]))
    assert np.array_equal(np.asarray(rewarded)[top:, -captioned.shape[1] :], captioned)
    assert np.array_equal(
        np.asarray(rewarded)[top:, : captioned.shape[1]], np.asarray(grids.grid(before, 3, 12, ["0.1", "2", "-3"]))
    )


def test_long_titles_are_not_cut():
    x = torch.ones(1, 1, 8, 8)
    short = grids.before_after(x, x, titles=("a", "b"))
    long = grids.before_after(x, x, titles=("a" * 40, "b"))
    assert long.width > short.width
    assert (np.asarray(long)[: grids.TITLE + 4, 300:400] < 50).any()


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"images": torch.rand(3, 8, 8)}, r"images must have shape \(n, C, H, W\).*got \(3, 8, 8\)"),
        ({"images": torch.rand(2, 4, 8, 8)}, "C 1 or 3"),
        ({"images": torch.rand(0, 1, 8, 8)}, "n >= 1"),
        ({"images": torch.full((1, 1, 2, 2), 1.01)}, r"images must lie in \[0, 1\], got \[1.01, 1.01\]"),
        ({"images": torch.full((1, 1, 2, 2), -0.01)}, r"images must lie in \[0, 1\]"),
        ({"images": torch.full((1, 1, 2, 2), float("nan"))}, r"images must lie in \[0, 1\], got \[nan, nan\]"),
        ({"images": torch.rand(1, 1, 2, 2), "columns": 0}, "columns must be >= 1, got 0"),
        ({"images": torch.rand(1, 1, 2, 2), "scale": 0}, "scale must be >= 1, got 0"),
        ({"images": torch.rand(2, 1, 2, 2), "captions": ["a"]}, "captions must be one for each of the 2 images, got 1"),
    ],
)
def test_bad_input_is_refused(arguments, rule):
    with pytest.raises(ValueError, match=rule):
        grids.grid(**arguments)


def test_unequal_sides_are_refused():
    with pytest.raises(ValueError, match="after has shape"):
        grids.before_after(images(2), images(3))
    with pytest.raises(ValueError, match="captions must be one for each of the 2 images, got 1"):
        grids.before_after(images(2), images(2), rewards=([1.0, 2.0], [1.0]))


def test_a_grid_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    path = grids.save_grid(tmp_path / "new" / "grid.png", images(3), columns=3, captions=["a", "b", "c"])
    with Image.open(path) as back:
        expected = grids.grid(images(3), columns=3, captions=["a", "b", "c"])
        assert np.array_equal(np.asarray(back), np.asarray(expected))
    whole = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        grids.save_grid(path, images(2))
    monkeypatch.undo()
    assert path.read_bytes() == whole
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]
    grids.save_grid(path, grids.before_after(images(1), images(1)))
    assert path.read_bytes() != whole
    with pytest.raises(ValueError, match="path must end in .png"):
        grids.save_grid(tmp_path / "grid.jpg", images(1))
