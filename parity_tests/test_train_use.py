"""What can be done with a trained run: evaluate it, have it see images, export it to PyTorch."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.special import softmax

from parity_tests.commands import ROOT
from parity_tests.gates import assert_errors_within_ratio, assert_identical
from parity_tests.test_train_cli import rows
from parity_tests.test_train_data import Capture, write_files
from train import evaluate, export, originals, predict
from train.__main__ import main
from train.config import read_config
from train.data import load
from train.images import read_image, read_images
from train.saved import Saved, most_probable, outputs_of, read_models

MODELS = ("cnn", "net")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both models, trained for 2 epochs; their weights are in files and in checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    assert (
        main(["--devices", "1", "--epochs", "2", "--save-model", "--checkpoint-every", "1000", "--out", str(folder)])
        == 0
    )
    return folder


@pytest.fixture(scope="module")
def models(run: Path) -> list[Saved]:
    return read_models(run, read_config(run), None)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run to spoil."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def error_of(capsys: Capture, command: Callable[..., int], *arguments: str | Path) -> str:
    """The one line that the command prints instead of a result."""
    capsys.readouterr()
    assert command([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_evaluation_repeats_the_last_epochs_accuracy(run: Path, capsys: Capture) -> None:
    assert evaluate.main([str(run), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert list(results) == list(MODELS)
    counts = np.bincount(load("digits").test.labels)
    for model, result in results.items():
        recorded = rows(run / model)[-1]["validation"]
        assert (result["accuracy"], result["images"]) == (recorded["accuracy"], recorded["images"])
        assert result["loss"] == pytest.approx(recorded["loss"], rel=1e-5)
        assert list(result["classes"]) == list("0123456789")
        assert np.dot(list(result["classes"].values()), counts) / 360 == pytest.approx(result["accuracy"])
        assert len(set(result["classes"].values())) > 3


def test_evaluation_table_has_a_column_for_each_model(run: Path, capsys: Capture) -> None:
    assert evaluate.main([str(run)]) == 0
    both = capsys.readouterr().out
    cells = [f"{rows(run / model)[-1]['validation']['accuracy']:.2%}" for model in MODELS]
    assert ["accuracy", *cells] in [line.split() for line in both.splitlines()]
    assert evaluate.main([str(run), "--model", "net"]) == 0
    one = capsys.readouterr().out
    assert ["accuracy", cells[1]] in [line.split() for line in one.splitlines()]
    assert "cnn" not in one


def test_weights_come_from_the_newest_sound_checkpoint_if_no_file_has_them(run: Path, copy: Path) -> None:
    for model in MODELS:
        (copy / model / "model.safetensors").unlink()
        shutil.copytree(copy / model / "checkpoints/90", copy / model / "checkpoints/95")
        for path in (copy / model / "checkpoints/95").rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:20])
    before = sorted(copy.rglob("*"))
    for file, checkpoint in zip(
        *(read_models(folder, read_config(folder), None) for folder in (run, copy)), strict=True
    ):
        assert checkpoint.source.endswith(f"{file.name}/checkpoints/90")
        assert_identical(
            nnx.to_pure_dict(nnx.state(checkpoint.module, nnx.Param)),
            nnx.to_pure_dict(nnx.state(file.module, nnx.Param)),
        )
    assert sorted(copy.rglob("*")) == before


def test_resuming_replaces_the_weights_that_an_interruption_left(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"save_model": False, "model": "net"}))
    file = copy / "net/model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(b"outdated")
    assert main(["--resume", str(copy)]) == 0
    assert file.read_bytes() == whole


def save(folder: Path, change: Callable[[np.ndarray], np.ndarray], count: int = 50) -> list[Path]:
    """The first test digits as PNG files, changed."""
    paths = [folder / f"{number}.png" for number in range(count)]
    for path, image in zip(paths, np.asarray(load("digits").test.images), strict=False):
        Image.fromarray(change(image)).save(path)
    return paths


def tenfold(image: np.ndarray) -> np.ndarray:
    return np.kron(image, np.ones((10, 10), np.uint8))


def red_on_transparent(image: np.ndarray) -> np.ndarray:
    full = np.full_like(image, 255)
    return np.stack([full, full - full, full - full, image], axis=-1)


SAME = {
    "as it is": lambda image: image,
    "inverted": lambda image: 255 - image,
    "in colours": lambda image: np.stack([image] * 3, axis=-1),
    "black on transparent": lambda image: np.stack([*[np.zeros_like(image)] * 3, image], axis=-1),
    "16 bits": lambda image: image.astype(np.uint16) * 257,
}
ALIKE = {
    "tenfold": tenfold,
    "tenfold and inverted": lambda image: 255 - tenfold(image),
    "on a wide grey page": lambda image: np.pad(200 - tenfold(image) // 2, ((30, 90), (500, 20)), constant_values=200),
    "red on transparent": lambda image: red_on_transparent(tenfold(image)),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_test_images_in_files_are_read_as_they_are(tmp_path: Path, change: Callable[..., np.ndarray]) -> None:
    images = np.asarray(load("digits").test.images)
    for path, image in zip(save(tmp_path, change, 5), images, strict=False):
        np.testing.assert_array_equal(read_image(path, "digits"), image)


def test_16_bits_of_a_pgm_file_are_read_as_they_are(tmp_path: Path) -> None:
    image = np.asarray(load("digits").test.images[0])
    (tmp_path / "digit.pgm").write_bytes(b"P5 28 28 65535\n" + (image.astype(">u2") * 257).tobytes())
    np.testing.assert_array_equal(read_image(tmp_path / "digit.pgm", "digits"), image)


@pytest.mark.parametrize("change", ALIKE.values(), ids=ALIKE)
def test_large_pictures_of_test_images_are_seen_alike(
    tmp_path: Path, models: list[Saved], change: Callable[..., np.ndarray]
) -> None:
    test = load("digits").test
    images = read_images(save(tmp_path, change), "digits")
    for model in models:
        same = outputs_of(model.module, test)[:50].argmax(-1)
        seen = np.array([best[0][0] for best in most_probable(model, images)])
        assert np.mean(seen == same) >= 0.8  # after the default 15 and 20 epochs it is 0.98


def test_mnists_pictures_are_fitted_into_20_pixels_and_centred_by_mass(tmp_path: Path) -> None:
    picture = np.full((300, 500), 255, np.uint8)
    picture[50:250, 30:60] = 0  # an L, 200 pixels high
    picture[220:250, 30:130] = 0
    Image.fromarray(picture).save(tmp_path / "L.png")
    image = read_image(tmp_path / "L.png", "mnist").astype(float)
    assert image.shape == (28, 28)
    drawn = image > 0
    assert (drawn.any(1).sum(), drawn.any(0).sum(), image.max()) == (20, 10, 255)
    for axis in (0, 1):
        assert abs(np.average(np.arange(28), weights=image.sum(1 - axis)) - 14) <= 0.5
    clothes = read_image(tmp_path / "L.png", "fashion-mnist") > 0
    assert (np.flatnonzero(clothes.any(1)).tolist(), np.flatnonzero(clothes.any(0)).tolist()) == (
        list(range(28)),
        list(range(7, 21)),
    )


def test_prediction_prints_the_three_most_probable_classes(
    run: Path, models: list[Saved], tmp_path: Path, capsys: Capture
) -> None:
    paths = save(tmp_path, lambda image: image, 3)
    assert predict.main([str(run), *map(str, paths)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for model in models:
        probabilities = softmax(outputs_of(model.module, load("digits").test)[:3].astype(float), axis=-1)
        assert [model.name, "1st", "2nd", "3rd"] in lines
        for best, row in zip(most_probable(model, read_images(paths, "digits")), probabilities, strict=True):
            order = np.argsort(-row)[:3]
            assert (best[0][0], [index for index, _ in best]) == (row.argmax(), order.tolist())
            np.testing.assert_allclose([probability for _, probability in best], row[order], rtol=1e-4)
            cells = [cell for index, value in best for cell in (str(index), f"{value:.2%}")]
            assert any(line[1:] == cells for line in lines)


@pytest.mark.parametrize("model", MODELS)
def test_export_loads_into_the_original_with_the_same_outputs(
    run: Path, models: list[Saved], tmp_path: Path, model: str
) -> None:
    files = [tmp_path / "model.pt", tmp_path / "model.safetensors"]
    for file in files:
        assert export.main([str(run), str(file), "--model", model]) == 0
    assert sorted(tmp_path.iterdir()) == files
    pickled, weights = torch.load(files[0], weights_only=True), load_file(files[1])
    assert_identical(pickled, weights)
    original = {"cnn": originals.CNN, "net": originals.Net}[model]()
    original.load_state_dict(pickled)
    test = load("digits").test
    images = torch.from_numpy(np.asarray(test.images))[:, None] / 255
    with torch.no_grad():
        theirs = original.eval()(images).numpy()
        exact = original.double()(images.double()).numpy()
    ours = outputs_of(next(each for each in models if each.name == model).module, test)
    assert_errors_within_ratio([(ours, theirs, exact)])


def test_without_torch_safetensors_are_written_and_pt_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails
    assert export.main([str(run), str(tmp_path / "a.safetensors"), "--model", "cnn"]) == 0
    assert "needs PyTorch" in error_of(capsys, export.main, run, tmp_path / "a.pt", "--model", "cnn")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_export_needs_a_suffix_a_free_name_and_a_choice(run: Path, tmp_path: Path, capsys: Capture) -> None:
    def error(file: Path, *arguments: str) -> str:
        return error_of(capsys, export.main, run, file, *arguments)

    (tmp_path / "taken.pt").touch()
    assert "choose with --model cnn or --model net" in error(tmp_path / "a.pt")
    assert "must end in .safetensors or .pt" in error(tmp_path / "a.onnx", "--model", "cnn")
    assert "exists already" in error(tmp_path / "taken.pt", "--model", "cnn")
    assert "No such file or directory" in error(tmp_path / "nowhere/a.pt", "--model", "cnn")
    assert "Not a directory" in error(tmp_path / "taken.pt/a.safetensors", "--model", "cnn")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.pt"]


COMMANDS = {"evaluate": (evaluate.main, ()), "predict": (predict.main, ("x.png",)), "export": (export.main, ("x.pt",))}


@pytest.mark.parametrize(("command", "rest"), COMMANDS.values(), ids=COMMANDS)
def test_runs_that_cannot_be_used_are_named_in_one_line(
    copy: Path, capsys: Capture, command: Callable[..., int], rest: tuple[str, ...]
) -> None:
    def error() -> str:
        return error_of(capsys, command, copy, *rest, "--model", "net")

    weights = copy / "net/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert f"{weights} does not hold a net" in error()
    shutil.copy(copy / "cnn/model.safetensors", weights)
    assert "missing: conv1.bias" in error()
    weights.unlink()
    for path in (copy / "net/checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert "no checkpoint that can be read: checkpoint 90 is damaged" in error()
    shutil.rmtree(copy / "net/checkpoints")
    assert "no weights of net: train with --save-model or --checkpoint-every" in error()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model": "cnn"}))
    assert "--model net: the run" in error()
    for content in ("[]", "{"):
        (copy / "config.json").write_text(content)
        assert "holds no run" in error()
    for name, value in {"model": "vgg", "epochs": "three", "lr": [], "data_dir": 1, "recipes": None}.items():
        (copy / "config.json").write_text(json.dumps(config | {name: value}))
        assert f"holds no run of python -m train that can be read: {name} is {value} in config.json" in error()
    (copy / "config.json").write_text(json.dumps(config | {"recipes": {"cnn": {}}}))
    assert "config.json has no recipe of net" in error()
    shutil.rmtree(copy)
    assert "holds no run" in error()


@pytest.mark.parametrize(("command", "rest"), COMMANDS.values(), ids=COMMANDS)
def test_weights_that_are_not_finite_are_refused(
    copy: Path, capsys: Capture, command: Callable[..., int], rest: tuple[str, ...]
) -> None:
    weights = copy / "net/model.safetensors"
    tensors = load_file(weights)
    tensors["conv2.bias"][3] = torch.nan
    save_file(tensors, weights)
    assert f"{weights}: not all weights are finite" in error_of(capsys, command, copy, *rest, "--model", "net")


def test_names_of_emoji_are_printed_as_they_are(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    copy.rename(":cat:")
    (picture,) = save(tmp_path, lambda image: image, 1)
    picture.rename(":dog:.png")
    assert predict.main([":cat:", ":dog:.png"]) == 0
    assert evaluate.main([":cat:"]) == 0
    assert main(["--devices", "1", "--model", "net", "--epochs", "1", "--out", ":cow:"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (":cat:/net/model.safetensors", ":dog:.png", ":cow:/report.html"))


def test_evaluation_needs_no_tensorboard(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"tensorboard": True}))
    monkeypatch.setattr("train.config.find_spec", lambda name: None)
    assert evaluate.main([str(copy)]) == 0


def test_a_model_without_weights_is_left_out_unless_asked_for(copy: Path, capsys: Capture) -> None:
    shutil.rmtree(copy / "net")
    assert evaluate.main([str(copy), "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["cnn"]
    assert export.main([str(copy), str(copy / "cnn.pt")]) == 0


def test_pictures_that_cannot_be_used_are_named_in_one_line(run: Path, tmp_path: Path, capsys: Capture) -> None:
    whole, *_ = save(tmp_path, lambda image: image, 1)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:100])
    Image.new("L", (50, 50), 255).save(tmp_path / "blank.png")
    Image.new("I", (28, 28)).save(tmp_path / "integers.tif")
    Image.new("F", (28, 28)).save(tmp_path / "floats.tif")
    dots = np.zeros((2000, 2000), np.uint8)
    dots[[100, 1900], [100, 1900]] = 255
    Image.fromarray(dots).save(tmp_path / "dots.png")
    for name, message in {
        "missing.png": "No such file",
        "text.png": "cannot identify image file",
        "cut.png": "cannot be read as an image",
        "blank.png": "nothing stands out from the background",
        "dots.png": "nothing stands out from the background",
        "integers.tif": "32-bit pixels have no known range: save it with 8 or 16 bits",
        "floats.tif": "32-bit pixels have no known range: save it with 8 or 16 bits",
        "": "cannot be read as an image",
    }.items():
        error = error_of(capsys, predict.main, run, whole, tmp_path / name)
        assert str(tmp_path / name) in error
        assert message in error
    assert "at least one image" in error_of(capsys, predict.main, run)


def test_evaluation_takes_another_folder_of_data_and_names_a_missing_one(
    copy: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert "--data-dir and --download need --data mnist" in error_of(capsys, evaluate.main, copy, "--data-dir", ".")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"data": "mnist", "data_dir": str(tmp_path / "gone")}))
    assert f"{tmp_path}/gone" in error_of(capsys, evaluate.main, copy)
    write_files(tmp_path / "here")
    assert evaluate.main([str(copy), "--data-dir", str(tmp_path / "here"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cnn"]["images"] == 5


def test_help_and_mistakes_are_answered_before_jax_loads() -> None:
    code = """
import sys
from train import evaluate, export, predict, twin
for module in (evaluate, export, predict, twin):
    try:
        module.main(["--help"])
    except SystemExit as answered:
        assert answered.code == 0
assert [evaluate.main(["x"]), export.main(["x", "x.pt"]), predict.main(["x", "x.png"])] == [2, 2, 2]
assert twin.main(["--epochs", "0"]) == 2
sys.exit(bool({"jax", "torch"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: python -m train.") == 4
