"""The images to learn from: scikit-learn's digits, MNIST or Fashion-MNIST, as unsigned bytes."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pooch
from sklearn.datasets import load_digits

from train import idx
from train.config import DataName, UserError
from train.download import download

DIGITS = tuple("0123456789")
FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
CLASSES: dict[DataName, tuple[str, ...]] = {"digits": DIGITS, "mnist": DIGITS, "fashion-mnist": FASHION}

# Mean and standard deviation of the training pixels in [0, 1]; with them the notes' SGD learns in two epochs.
SCALES: dict[DataName, tuple[float, float]] = {
    "digits": (0.0, 1.0),
    "mnist": (0.1307, 0.3081),
    "fashion-mnist": (0.2860, 0.3530),
}


class Split(NamedTuple):
    """Images (count, 28, 28) and labels (count,), both uint8; a model sees (image / 255 - mean) / deviation."""

    images: np.ndarray | jax.Array  # on the host | on a device
    labels: np.ndarray | jax.Array
    mean: float = 0.0
    deviation: float = 1.0


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, the names of the classes, and what to tell the user about it all."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    note: str

    def sha256(self) -> str:
        """Of all images and labels."""
        digest = hashlib.sha256()
        for array in (self.train.images, self.train.labels, self.test.images, self.test.labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def load(data: DataName, data_dir: Path | None = None, fetch: bool = False) -> Dataset:
    """The data set: from scikit-learn, or from ``data_dir``, $JAXLOSS_DATA_DIR or the cache folder, in this order."""
    if data == "digits":
        return _digits()
    folder = data_dir or Path(os.environ.get("JAXLOSS_DATA_DIR") or pooch.os_cache("jaxloss"))
    return _idx(data, _files(data, folder, fetch))


def _digits() -> Dataset:
    """1,797 handwritten digits, 8x8 pixels of 0 to 16, bilinearly enlarged; the split never changes."""
    pixels, labels = load_digits(return_X_y=True)
    images = jax.image.resize(pixels.reshape(-1, 8, 8) / 16 * 255, (len(pixels), 28, 28), "bilinear")
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = np.asarray(images.round(), np.uint8)[order], labels.astype(np.uint8)[order]
    note = (
        "digits: scikit-learn's 8x8 scans enlarged to 28x28, 1437 for training and 360 for the test. "
        "Accuracy on them is not MNIST accuracy."
    )
    return Dataset(Split(images[:1437], labels[:1437]), Split(images[1437:], labels[1437:]), DIGITS, note)


def _files(data: DataName, folder: Path, fetch: bool) -> dict[str, Path]:
    """All four files of ``data`` below ``folder``, downloaded if allowed."""
    if fetch:
        folder.mkdir(parents=True, exist_ok=True)
    files = idx.find(data, folder)
    if fetch and len(files) < len(idx.NAMES):
        files = download(data, folder / data)
    for name in idx.NAMES:
        if name not in files:
            raise UserError(f"{data}: no {name}-ubyte or {name}-ubyte.gz below {folder}: pass --data-dir or --download")
    return files


def _idx(data: DataName, files: dict[str, Path]) -> Dataset:
    """Read the four files and hold the labels against the images."""
    contents = {name: idx.read(data, name, path) for name, path in files.items()}
    splits = []
    for images_name, labels_name in (idx.NAMES[:2], idx.NAMES[2:]):
        images, labels = contents[images_name][0], contents[labels_name][0]
        if len(images) != len(labels):
            raise UserError(
                f"{files[images_name]} holds {len(images)} images, {files[labels_name]} {len(labels)} labels"
            )
        if labels.max() > 9:
            raise UserError(f"{files[labels_name]}: label {labels.max()} at row {labels.argmax()} is not in 0..9")
        splits.append(Split(images, labels, *SCALES[data]))
    published = all(published for _, published in contents.values())
    counts = f"{len(splits[0].labels)} training and {len(splits[1].labels)} test images"
    note = f"{data}: {counts}, {'' if published else 'not '}the published files"
    return Dataset(*splits, classes=CLASSES[data], note=note)
