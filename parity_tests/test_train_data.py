"""The data of `python -m train`: every layout it finds, and every fault it names."""

import gzip
import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from train import idx
from train.__main__ import main
from train.config import DataName, UserError
from train.data import load

NEEDS_DATA = "set JAXLOSS_DATA_DIR to a folder that holds mnist/ and fashion-mnist/ with the IDX files"
Capture = pytest.CaptureFixture[str]
Spoil = Callable[[bytes], bytes]
COUNTS = {"train": 12, "t10k": 5}


def idx_bytes(name: str, seed: int = 0) -> bytes:
    """A small, sound IDX file."""
    count = COUNTS[name.split("-")[0]]
    shape = (count, 28, 28) if "images" in name else (count,)
    values = np.random.default_rng(seed).integers(0, 256 if "images" in name else 10, shape, np.uint8)
    return struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape) + values.tobytes()


def write_files(folder: Path, spelling: str = "{}-ubyte.gz") -> Path:
    """Four small files; `spelling` may move the dot and add .gz."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in idx.NAMES:
        content = idx_bytes(name)
        dotted = name.replace("-idx", ".idx")
        path = folder / spelling.format(dotted if spelling.startswith(".") else name).removeprefix(".")
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return folder


def fault_of(capsys: Capture, folder: Path, data: str = "mnist") -> str:
    """The one line that the command prints instead of training."""
    assert main(["--data", data, "--data-dir", str(folder), "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("spelling", ["{}-ubyte", "{}-ubyte.gz", ".{}-ubyte", ".{}-ubyte.gz"])
@pytest.mark.parametrize("place", ["", "raw", "MNIST/raw", "MNIST", "mnist", "mnist/raw", "mnist/MNIST/raw"])
def test_load_finds_every_layout_and_spelling(tmp_path: Path, place: str, spelling: str) -> None:
    write_files(tmp_path / place, spelling)
    data = load("mnist", tmp_path)
    expected = np.frombuffer(idx_bytes("train-images-idx3")[16:], np.uint8).reshape(12, 28, 28)
    np.testing.assert_array_equal(data.train.images, expected)
    assert data.test.images.shape == (5, 28, 28)
    assert data.test.labels.tolist() == list(idx_bytes("t10k-labels-idx1")[8:])
    assert "not the published files" in data.note


def test_load_tells_the_two_torchvision_folders_apart(tmp_path: Path) -> None:
    write_files(tmp_path / "MNIST/raw")
    fashion = write_files(tmp_path / "FashionMNIST/raw")
    (fashion / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes("t10k-labels-idx1", seed=1)))
    assert load("fashion-mnist", tmp_path).test.labels.tolist() == list(idx_bytes("t10k-labels-idx1", seed=1)[8:])
    assert load("mnist", tmp_path).test.labels.tolist() == list(idx_bytes("t10k-labels-idx1")[8:])


def test_load_takes_the_folder_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXLOSS_DATA_DIR", str(write_files(tmp_path / "mnist").parent))
    assert len(load("mnist").train.labels) == 12
    with pytest.raises(UserError, match="elsewhere: No such file"):
        load("mnist", tmp_path / "elsewhere")


def test_digits_are_the_fixed_split_of_scikit_learn() -> None:
    data = load("digits")
    assert data.train.images.shape == (1437, 28, 28)
    assert data.test.images.shape == (360, 28, 28)
    assert data.train.images.dtype == data.train.labels.dtype == np.uint8
    assert data.train.images.max() == 255
    np.testing.assert_array_equal(load("digits").test.labels, data.test.labels)
    assert min(np.bincount(data.test.labels)) > 20
    assert "not MNIST accuracy" in data.note


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
FAULTS: dict[str, tuple[str, Spoil, str]] = {
    "truncated": (IMAGES, lambda content: content[:-1], "must be 9424 bytes for 12 28x28 images, got 9423"),
    "padded": (IMAGES, lambda content: content + b"\0", "got 9425"),
    "header only": (IMAGES, lambda content: content[:7], "is not an IDX file of 28x28 images"),
    "empty": (IMAGES, lambda content: b"", "is not an IDX file"),
    "html": (IMAGES, lambda content: b"<html>404</html>" * 9, "is not an IDX file"),
    "labels as images": (IMAGES, lambda content: idx_bytes(LABELS), "is not an IDX file of 28x28 images"),
    "images as labels": (LABELS, lambda content: idx_bytes(IMAGES), "is not an IDX file of labels"),
    "not 28x28": (IMAGES, lambda content: content[:8] + struct.pack(">2I", 14, 56) + content[16:], "(12, 14, 56)"),
    "no items": (LABELS, lambda content: content[:4] + bytes(4), "must hold labels, but its shape is (0,)"),
    "label 10": (LABELS, lambda content: content[:-2] + b"\n\1", "label 10 at row 10 is not in 0..9"),
    "fewer labels": (LABELS, lambda content: content[:4] + struct.pack(">I", 5) + content[8:13], "5 labels"),
    "git-LFS": (IMAGES, lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "still gzipped": (IMAGES, gzip.compress, "is not an IDX file"),
}


@pytest.mark.parametrize(("file", "spoil", "message"), FAULTS.values(), ids=FAULTS)
def test_plain_file_with_a_fault_is_named(
    tmp_path: Path, capsys: Capture, file: str, spoil: Spoil, message: str
) -> None:
    path = write_files(tmp_path, "{}-ubyte") / file
    path.write_bytes(spoil(path.read_bytes()))
    line = fault_of(capsys, tmp_path)
    assert message in line
    assert str(path) in line


GZIP_FAULTS: dict[str, tuple[Spoil, str]] = {
    "truncated": (lambda content: content[:-20], "is truncated"),
    "not gzip": (gzip.decompress, "is not a sound gzip file"),
    "a bit flipped": (
        lambda content: content[:-6] + bytes([content[-6] ^ 1]) + content[-5:],
        "is not a sound gzip file",
    ),
    "html": (lambda content: b"<html>404</html>", "is not a sound gzip file"),
    "git-LFS": (lambda content: b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
}


@pytest.mark.parametrize(("spoil", "message"), GZIP_FAULTS.values(), ids=GZIP_FAULTS)
def test_gzip_file_with_a_fault_is_named(tmp_path: Path, capsys: Capture, spoil: Spoil, message: str) -> None:
    path = write_files(tmp_path) / f"{IMAGES}.gz"
    path.write_bytes(spoil(path.read_bytes()))
    line = fault_of(capsys, tmp_path)
    assert message in line
    assert str(path) in line


@pytest.mark.parametrize("name", idx.NAMES)
def test_missing_file_is_named(tmp_path: Path, capsys: Capture, name: str) -> None:
    (write_files(tmp_path) / f"{name}-ubyte.gz").unlink()
    assert f"no {name}-ubyte" in fault_of(capsys, tmp_path)


def test_empty_and_unreadable_folders_are_named(tmp_path: Path, capsys: Capture) -> None:
    assert f"below {tmp_path}: pass --data-dir or --download" in fault_of(capsys, tmp_path)
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'}: Not a directory" in fault_of(capsys, tmp_path / "file")
    assert "No such file or directory" in fault_of(capsys, tmp_path / "nowhere")


@pytest.mark.parametrize("spelling", ["{}-ubyte", "{}-ubyte.gz"])
def test_known_file_under_another_name_is_refused(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    digest = hashlib.sha256(idx_bytes("train-images-idx3")).hexdigest()
    monkeypatch.setitem(idx.KNOWN, digest, ("fashion-mnist", "train-images-idx3"))
    write_files(tmp_path, spelling)
    assert "holds fashion-mnist's train-images-idx3-ubyte, not mnist's" in fault_of(capsys, tmp_path)
    assert len(load("fashion-mnist", tmp_path).train.images) == 12


@pytest.mark.skipif(not os.environ.get("JAXLOSS_DATA_DIR"), reason=NEEDS_DATA)
@pytest.mark.parametrize(("data", "other"), [("mnist", "fashion-mnist"), ("fashion-mnist", "mnist")])
def test_published_files_are_recognised(tmp_path: Path, capsys: Capture, data: DataName, other: DataName) -> None:
    folder = Path(os.environ["JAXLOSS_DATA_DIR"])
    published = load(data, folder)
    assert published.note == f"{data}: 60000 training and 10000 test images, the published files"
    assert published.train.images.shape == (60000, 28, 28)
    (tmp_path / data).symlink_to(folder / other)
    assert f"holds {other}'s train-images" in fault_of(capsys, tmp_path, data)
