"""Grids of images, and images before and after fine-tuning side by side."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from scale.checkpoints import write_atomically

Pixels = NDArray[np.uint8]

MARGIN = 4
CAPTION, TITLE = 12, 18  # sizes of the letters, in pixels
_VISIBLE = 96  # shorter side, in pixels, up to which small images are enlarged
_WHITE, _GREY, _BLACK = (255, 255, 255), (160, 160, 160), (0, 0, 0)


def grid(
    images: Tensor | NDArray,
    columns: int | None = None,
    scale: int | None = None,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Lay images (n, C, H, W) in [0, 1], C = 1 or 3, out row by row on white, as an RGB image.

    Args:
        columns: by default those of the squarest grid.
        scale: whole factor of enlargement, each pixel becoming a square; by default the smallest that makes the
            shorter side 96 pixels or more, so that images of 8 x 8 can be seen and those of 512 x 512 are kept.
        captions: one line under each image, cut where it is too long.

    Raises:
        ValueError: if the images are not as above, if columns or scale < 1, or the captions are not n.
    """
    cells = _enlarged(_to_pixels(images), scale)
    n, height, width, _ = cells.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns must be >= 1, got {columns}")
    if captions is not None and len(captions) != n:
        raise ValueError(f"captions must be one for each of the {n} images, got {len(captions)}")
    columns, rows = min(columns, n), math.ceil(n / min(columns, n))
    below = 0 if captions is None else CAPTION + 4
    sheet = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, rows * (height + below + MARGIN) + MARGIN), _WHITE)
    for i, cell in enumerate(cells):
        x = MARGIN + (i % columns) * (width + MARGIN)
        y = MARGIN + (i // columns) * (height + below + MARGIN)
        sheet.paste(Image.fromarray(cell), (x, y))
        if captions is not None:
            _write(sheet, captions[i], (x, y + height + 1), width)
    return sheet


def before_after(
    before: Tensor | NDArray,
    after: Tensor | NDArray,
    columns: int | None = None,
    scale: int | None = None,
    titles: tuple[str, str] = ("before", "after"),
    rewards: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Image.Image:
    """Put the grids of two sets of images (n, C, H, W) of equal shape side by side, each under its title.

    Image i of both sets should have the same prompt and the same noise. With rewards, two sequences of n numbers, each
    image has its own below it.

    Raises:
        ValueError: if the shapes differ or the rewards are not n each; as of `grid`.
    """
    if before.shape != after.shape:
        raise ValueError(f"after has shape {tuple(after.shape)}, must be that of before, {tuple(before.shape)}")
    captions = (None, None) if rewards is None else tuple([f"{float(r):.3g}" for r in side] for side in rewards)
    left, right = (grid(images, columns, scale, text) for images, text in zip((before, after), captions, strict=True))
    font = _font(TITLE)
    wide = [
        max(side.width, math.ceil(font.getlength(title)) + 2 * MARGIN)
        for side, title in zip((left, right), titles, strict=True)
    ]
    top, gap = TITLE + 10, 4 * MARGIN
    sheet = Image.new("RGB", (wide[0] + gap + wide[1], top + left.height), _WHITE)
    for side, x, title in ((left, 0, titles[0]), (right, wide[0] + gap, titles[1])):
        sheet.paste(side, (x, top))
        ImageDraw.Draw(sheet).text((x + MARGIN, 4), title, fill=_BLACK, font=font)
    middle = wide[0] + gap // 2
    ImageDraw.Draw(sheet).line((middle, MARGIN, middle, sheet.height - MARGIN), fill=_GREY)
    return sheet


def save_grid(path: Path, images: Tensor | NDArray | Image.Image, **options: Any) -> Path:
    """Write a PNG so that a reader sees the old file or the new one whole; images are laid out by grid(**options).

    An image that is laid out already, such as that of `before_after`, is written as it is.

    Raises:
        ValueError: as of `grid`; if the path does not end in .png.
        OSError: if the file cannot be written.
    """
    if path.suffix != ".png":
        raise ValueError(f"path must end in .png, got {path}")
    sheet = images if isinstance(images, Image.Image) else grid(images, **options)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())
    return path


def _to_pixels(images: Tensor | NDArray) -> Pixels:
    """Return bytes (n, H, W, 3)."""
    x = images.detach().cpu().double().numpy() if isinstance(images, Tensor) else np.asarray(images, dtype=np.float64)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or x.size == 0:
        raise ValueError(f"images must have shape (n, C, H, W) with n >= 1 and C 1 or 3, got {x.shape}")
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError(f"images must lie in [0, 1], got [{x.min():.4g}, {x.max():.4g}]")
    rgb = np.broadcast_to(x, (len(x), 3, *x.shape[2:])).transpose(0, 2, 3, 1)
    return np.rint(255 * rgb).astype(np.uint8)


def _enlarged(cells: Pixels, scale: int | None) -> Pixels:
    factor = math.ceil(_VISIBLE / min(cells.shape[1:3])) if scale is None else scale
    if factor < 1:
        raise ValueError(f"scale must be >= 1, got {scale}")
    return cells.repeat(factor, axis=1).repeat(factor, axis=2)


def _write(sheet: Image.Image, caption: str, corner: tuple[int, int], width: int) -> None:
    """Draw one line of text, cut to the width."""
    font, line = _font(CAPTION), " ".join(caption.split())
    if font.getlength(line) > width:
        while line and font.getlength(line + "…") > width:
            line = line[:-1]
        line += "…"
    ImageDraw.Draw(sheet).text(corner, line, fill=_BLACK, font=font)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font that matplotlib brings: Pillow's own lacks even accented letters."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
