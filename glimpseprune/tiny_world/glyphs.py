"""Glyphs as small opacity images, cut once from the font that Pillow carries and then kept.

System fonts differ from machine to machine, so pages are set in the one scalable font that every
Pillow from 10.1 on ships. A page is drawn by blending these cuts into an array, which takes a
few milliseconds; glyphs of one Pillow and FreeType release are always the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont


@dataclass(frozen=True)
class Glyph:
    """One character at one size: its ink and where the ink lies against the baseline.

    `opacity` is float32 `(height, width)` in [0, 1], cropped to the ink; `top` is the number of
    pixels from the baseline down to the first row of ink (negative above the baseline).
    """

    opacity: np.ndarray
    top: int

    @property
    def width(self) -> int:
        return self.opacity.shape[1]


@cache
def glyph(character: str, size: int, bold: bool) -> Glyph:
    """The cut of a visible character at `size` pixels an em."""
    stroke = 0.03 * size if bold else 0.0
    canvas = Image.new("L", (3 * size, 3 * size), 0)
    draw = ImageDraw.Draw(canvas)
    draw.text((size, 2 * size), character, fill=255, font=_font(size), anchor="ls")
    if bold:
        shifted = Image.new("L", canvas.size, 0)
        offset = size + max(1, round(stroke))
        ImageDraw.Draw(shifted).text(
            (offset, 2 * size), character, fill=255, font=_font(size), anchor="ls"
        )
        canvas = Image.fromarray(np.maximum(np.asarray(canvas), np.asarray(shifted)))
    left, top, right, bottom = canvas.getbbox()
    ink = np.asarray(canvas, dtype=np.float32)[top:bottom, left:right] / 255.0
    return Glyph(ink, top - 2 * size)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)
