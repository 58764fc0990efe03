"""MNIST's and Fashion-MNIST's IDX files: found in the usual layouts, and checked before they are believed."""

import gzip
import hashlib
import math
import os
import zlib
from pathlib import Path

import numpy as np

from train.config import DataName, UserError

TORCHVISION: dict[DataName, str] = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")

# SHA-256 of the published files without their gzip wrapping, in the order of NAMES.
CONTENTS: dict[DataName, tuple[str, ...]] = {
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "fashion-mnist": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}
KNOWN = {
    digest: (data, name) for data, digests in CONTENTS.items() for digest, name in zip(digests, NAMES, strict=True)
}
AGAIN = "copy it again, or delete it and run with --download"


def find(data: DataName, folder: Path) -> dict[str, Path]:
    """The files of ``data`` below ``folder``, by name, from whichever of the usual places holds most of them."""
    try:
        os.listdir(folder)
    except OSError as error:
        raise UserError(f"{data}: {folder}: {error.strerror}: pass --data-dir or --download") from error
    torchvision = TORCHVISION[data]
    parents = (folder / data, folder / torchvision, folder)
    places = [parent / place for parent in parents for place in ("", "raw", f"{torchvision}/raw")]
    return max((_files_in(place) for place in places), key=len)


def _files_in(place: Path) -> dict[str, Path]:
    files = {}
    for name in NAMES:
        spellings = (f"{name}-ubyte", f"{name.replace('-idx', '.idx')}-ubyte")
        paths = (place / (spelling + ending) for spelling in spellings for ending in ("", ".gz"))
        if path := next(filter(Path.is_file, paths), None):
            files[name] = path
    return files


def read(data: DataName, name: str, path: Path) -> tuple[np.ndarray, bool]:
    """The images or labels in ``path``, and whether they are the published ones."""
    content = _content(path)
    known = KNOWN.get(hashlib.sha256(content).hexdigest())
    if known not in (None, (data, name)):
        raise UserError(f"{path} holds {known[0]}'s {known[1]}-ubyte, not {data}'s {name}-ubyte: replace it")
    return _parse(content, path, (28, 28) if "images" in name else ()), known is not None


def _content(path: Path) -> bytes:
    """The file without its gzip wrapping."""
    content = path.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-LFS pointer, not the data: run `git lfs pull`")
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except EOFError as error:
        raise UserError(f"{path} is truncated: {AGAIN}") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a sound gzip file ({error}): {AGAIN}") from error


def _parse(content: bytes, path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Unsigned bytes of (count, *shape), which follow a magic number and the sizes as big-endian integers."""
    kind, axes = ("28x28 images" if shape else "labels"), 1 + len(shape)
    magic, start = bytes((0, 0, 8, axes)), 4 + 4 * axes  # 8 stands for unsigned bytes
    if content[:4] != magic or len(content) < start:
        raise UserError(f"{path} is not an IDX file of {kind}, whose first bytes are {magic.hex(' ')}: {AGAIN}")
    count, *sizes = np.frombuffer(content[4:start], ">u4").tolist()
    if tuple(sizes) != shape or count == 0:
        raise UserError(f"{path} must hold {kind}, but its shape is {(count, *sizes)}: {AGAIN}")
    if len(content) != start + count * math.prod(shape):
        raise UserError(
            f"{path} must be {start + count * math.prod(shape)} bytes for {count} {kind}, got {len(content)}: {AGAIN}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(count, *shape)
