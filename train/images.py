"""Image files as a data set would have them: 28x28 bytes, light on dark, with the drawing where that set has it."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from train.config import DataName, UserError
from train.data import SCALES, Split

SIZE = 28
FAINT = 32  # of 255: what is no brighter, like the shades of a photographed paper, does not count as drawn


class Fit(NamedTuple):
    """What was done to the drawings of a data set."""

    side: int  # the longer one of a drawing
    by_mass: bool  # its centre of mass is put at (14, 14), or at least near it; else its edges decide


FITS: dict[DataName, Fit] = {
    "digits": Fit(28, by_mass=True),
    "mnist": Fit(20, by_mass=True),
    "fashion-mnist": Fit(28, by_mass=False),
}


def read_images(paths: Sequence[Path], data: DataName) -> Split:
    """The images in some files as test images of ``data``, with labels that mean nothing."""
    images = np.stack([read_image(path, data) for path in paths])
    return Split(images, np.zeros(len(images), np.uint8), *SCALES[data])


def read_image(path: Path, data: DataName) -> np.ndarray:
    """The image in a file, of any size and colours, as one of ``data``.

    Where it is transparent it is white. It is inverted if most of its border is brighter than the middle of its range.
    At 28x28 pixels nothing else is changed. At any other size the border's shade becomes black and the brightest
    white, and the drawing is cut out, scaled without distortion and centred as was done for ``data``.
    """
    grey = _grey(path)
    ground, middle = np.median(np.concatenate([*grey[[0, -1]], *grey.T[[0, -1]]])), (grey.min() + grey.max()) / 2
    if ground > middle:
        grey, ground = 255 - grey, 255 - ground
    faint = grey.max() - ground <= FAINT
    if not faint and grey.shape != (SIZE, SIZE):
        grey = _fit(np.maximum(grey - ground, 0) * (255 / (grey.max() - ground)), FITS[data])
        faint = grey.max() <= FAINT  # small marks far apart
    if faint:
        raise UserError(f"{path}: nothing stands out from the background")
    return grey.round().astype(np.uint8)


def _grey(path: Path) -> np.ndarray:
    """Brightness from 0 to 255."""
    try:
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(path) as file,
        ):
            image = ImageOps.exif_transpose(file)
            # Pillow would cut off at 255.
            if image.mode.startswith("I;16") or (image.mode, file.format) == ("I", "PPM"):
                return np.asarray(image, np.float32) / 257
            if image.mode in ("I", "F"):
                raise ValueError("32-bit pixels have no known range: save it with 8 or 16 bits")
            image = image.convert("RGBA")
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("L"), np.float32)


def _fit(drawing: np.ndarray, fit: Fit) -> np.ndarray:
    rows, columns = (np.flatnonzero(drawing.max(axis) > FAINT) for axis in (1, 0))
    drawing = drawing[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = (max(1, round(size * fit.side / max(drawing.shape))) for size in drawing.shape)
    drawing = _resize(drawing, height, width)
    top, left = (_start(drawing.sum(axis), fit) for axis in (1, 0))
    return np.pad(drawing, ((top, SIZE - top - height), (left, SIZE - left - width)))


def _start(weights: np.ndarray, fit: Fit) -> int:
    """Where to begin with what weighs so much along an axis."""
    space = SIZE - len(weights)
    if not fit.by_mass:
        return space // 2
    centre = np.average(np.arange(len(weights)), weights=weights)
    return int(np.clip(round(SIZE / 2 - centre), 0, space))


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Means of areas, or values in between."""
    how = Image.Resampling.BOX if height < len(image) else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(image).resize((width, height), how))
