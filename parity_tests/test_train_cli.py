"""`python -m train` as a user meets it: the default run, its files, its exit codes, Ctrl-C, and real MNIST."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from parity_tests.commands import start_python, start_training
from parity_tests.test_train_data import NEEDS_DATA, Capture
from train import originals
from train.__main__ import main
from train.config import RECIPES, Config
from train.data import load
from train.report import Monitor

PICTURES = ("curves.png", "confusion.png")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_default_run_reaches_95_percent_with_both_models(tmp_path: Path) -> None:
    process = start_training(cwd=tmp_path)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    (folder,) = (tmp_path / "runs").iterdir()
    for model, recipe in RECIPES["digits"].items():
        epochs = rows(folder / model)
        assert [row["epoch"] for row in epochs] == list(range(1, recipe.epochs + 1))
        assert epochs[-1]["validation"]["accuracy"] >= 0.95
        assert all(row["training"]["images"] == 1437 for row in epochs)
        assert all((folder / model / picture).read_bytes().startswith(b"\x89PNG") for picture in PICTURES)
        assert re.search(rf"^ {model} .* {epochs[-1]['validation']['accuracy']:.2%} ", out, re.MULTILINE)
    assert len(re.findall(r"^Epoch : [ \d]{4}/15 Cost : \d+\.\d{6}$", out, re.MULTILINE)) == 15
    for phase in ("training", "validation"):
        pattern = rf"^\[{phase}\] epoch: [ \d]\d loss: \d\.\d{{8}} accuracy: \d\.\d{{8}}$"
        assert len(re.findall(pattern, out, re.MULTILINE)) == 20
    assert "Accuracy on them is not MNIST accuracy." in out
    assert not list(folder.glob("*/model.safetensors"))


def test_ctrl_c_saves_and_reports_what_was_learned(tmp_path: Path) -> None:
    process = start_training("--epochs", "2000", "--out", "run", cwd=tmp_path)
    assert process.stdout
    lines = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert "cross_entropy" in lines[0]
    assert "interrupted: saving and reporting what was learned so far" in out
    assert re.search(r"^ cnn +cross_entropy .*/2000 ", out, re.MULTILINE)
    assert "nll_loss" not in out
    epochs = rows(tmp_path / "run/cnn")
    assert len(epochs) >= 2
    assert all((tmp_path / "run/cnn" / picture).exists() for picture in PICTURES)
    assert torch_accuracy("cnn", tmp_path / "run") == epochs[-1]["validation"]["accuracy"]


def test_second_ctrl_c_ends_at_once_without_traceback(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "report.html")  # who opens it to write waits for a reader
    process = start_training("--model", "net", "--epochs", "5000", "--out", tmp_path)
    assert process.stdout
    assert "nll_loss" in process.stdout.readline()
    assert process.stdout.readline().startswith("[training]")
    process.send_signal(signal.SIGINT)
    assert any("interrupted: saving" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "error: interrupted\n")


def test_ctrl_c_saves_the_models_before_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def epoch(monitor: Monitor, _: object) -> None:
        if monitor.learner.model == "net":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Monitor, "epoch", epoch)
    assert main(["--devices", "1", "--epochs", "1", "--out", str(tmp_path)]) == 130
    for model in ("cnn", "net"):
        assert torch_accuracy(model, tmp_path) == pytest.approx(rows(tmp_path / model)[-1]["validation"]["accuracy"])


def test_ctrl_c_while_the_report_is_written_saves_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.run.save_report", lambda *_: signal.raise_signal(signal.SIGINT))
    assert main(["--devices", "1", "--model", "net", "--epochs", "1", "--out", str(tmp_path)]) == 130
    assert (tmp_path / "net/model.safetensors").exists()


def test_ctrl_c_saves_the_models_though_no_report_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def epoch(monitor: Monitor, _: object) -> None:
        if monitor.learner.model == "net":
            (tmp_path / "report.html").unlink()
            (tmp_path / "report.html").mkdir()
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Monitor, "epoch", epoch)
    assert main(["--devices", "1", "--epochs", "1", "--out", str(tmp_path)]) == 2
    assert f"Is a directory: '{tmp_path}/report.html'" in capsys.readouterr().err
    assert all((tmp_path / model / "model.safetensors").exists() for model in ("cnn", "net"))


def test_closed_pipe_ends_without_traceback(tmp_path: Path) -> None:
    with start_training("--model", "net", "--epochs", "5000", cwd=tmp_path) as process:
        assert process.stdout
        assert process.stderr
        assert "nll_loss" in process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_training_loads_no_torch_and_the_second_start_finds_the_programs_of_the_first(tmp_path: Path) -> None:
    code = "import sys; from train.__main__ import main; sys.exit(main() or 'torch' in sys.modules)"
    outputs, programs = [], []
    for run in ("first", "second"):
        command = ("--model", "net", "--epochs", "1", "--save-model", "--out", run)
        process = start_python("-c", code, *command, cwd=tmp_path, cache=tmp_path / "cache")
        out, err = process.communicate()
        assert (process.returncode, err) == (0, "")
        outputs.append(out)
        programs.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("jit_step*-cache")})
    assert {path.name.split("-")[0] for path in programs[0]} == {"jit_step", "jit_steps"}
    assert programs[0] == programs[1]
    assert loss_of(outputs[0]) == loss_of(outputs[1])
    first, second = (tmp_path / run / "net/model.safetensors" for run in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def loss_of(output: str) -> str:
    return next(line for line in output.splitlines() if line.startswith("[validation]"))


def torch_accuracy(model: str, folder: Path) -> float:
    """What PyTorch's original makes of the digits with the weights in a run's folder."""
    module = {"cnn": originals.CNN, "net": originals.Net}[model]()
    module.load_state_dict(load_file(folder / model / "model.safetensors"))
    images, labels = (torch.from_numpy(np.asarray(part)) for part in load("digits").test[:2])
    with torch.no_grad():
        outputs = module.eval()(images[:, None].float() / 255)
    return (outputs.argmax(dim=1) == labels).double().mean().item()


@pytest.mark.parametrize("model", ["cnn", "net"])
def test_saved_model_gives_the_same_accuracy_in_torch(tmp_path: Path, model: str) -> None:
    command = ["--model", model, "--epochs", "2", "--save-model", "--target-accuracy", "0.5"]
    assert main(["--devices", "1", *command, "--out", str(tmp_path)]) == 0
    assert torch_accuracy(model, tmp_path) == pytest.approx(rows(tmp_path / model)[-1]["validation"]["accuracy"])
    assert (tmp_path / model / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_model_that_fits_on_no_disk_is_one_line_and_no_file(tmp_path: Path) -> None:
    command = ("--model", "cnn", "--epochs", "1", "--save-model", "--out", tmp_path)
    _, error = start_training(*command, limit="ulimit -f 150;").communicate(timeout=120)
    file = tmp_path / "cnn/model.safetensors"
    assert error.startswith(f"error: {file} cannot be written: ")
    assert error.count("\n") == 1, error
    assert not list(file.parent.glob("model*"))


def test_same_seed_gives_the_same_metrics(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert (
            main(["--devices", "1", "--epochs", "1", "--model", "cnn", "--seed", "1", "--out", str(tmp_path / name)])
            == 0
        )
    metrics = {name: rows(tmp_path / name / "cnn")[0] for name in ("a", "b")}
    for row in metrics.values():
        assert set(row.pop("timing")) == {"training_seconds", "validation_seconds", "images_per_second"}
    assert metrics["a"] == metrics["b"]


def test_dry_run_takes_one_step_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--devices", "1", "--dry-run", "--log-interval", "1", "--save-model", "--target-accuracy", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("step     1/45") == 2
    assert "step     2/45" not in out
    assert list(tmp_path.iterdir()) == []


def test_log_interval_prints_every_kth_step(tmp_path: Path, capsys: Capture) -> None:
    assert (
        main(["--devices", "1", "--model", "net", "--epochs", "2", "--log-interval", "20", "--out", str(tmp_path)]) == 0
    )
    steps = re.findall(r"^step +(\d+)/45 loss: \d\.\d{6}$", capsys.readouterr().out, re.MULTILINE)
    assert steps == ["20", "40", "20", "40"]


def test_missed_target_exits_1_after_saving(tmp_path: Path, capsys: Capture) -> None:
    assert (
        main(["--devices", "1", "--model", "net", "--epochs", "1", "--target-accuracy", "1", "--out", str(tmp_path)])
        == 1
    )
    assert re.fullmatch(r"error: test accuracy below --target-accuracy 1.0: net 0\.\d{4}\n", capsys.readouterr().err)
    assert (tmp_path / "net/curves.png").exists()


def test_divergence_exits_1_in_one_line(tmp_path: Path, capsys: Capture) -> None:
    assert main(["--devices", "1", "--model", "cnn", "--optimizer", "sgd", "--lr", "1e30", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "error: cnn: the loss is not finite after epoch 1: lower --lr\n"


MISTAKES = {
    "negative epochs": ("--epochs -1", "--epochs must be at least 1, got -1"),
    "no epochs": ("--epochs 0", "--epochs must be at least 1"),
    "empty batches": ("--batch-size 0", "--batch-size must be at least 1"),
    "NaN learning rate": ("--lr nan", "--lr must be a positive number, got nan"),
    "infinite learning rate": ("--lr inf", "--lr must be a positive number"),
    "zero learning rate": ("--lr 0", "--lr must be a positive number"),
    "momentum without sgd": ("--momentum 0.9", "--momentum is for --optimizer sgd only; the cnn uses adam here"),
    "momentum 1": ("--optimizer sgd --momentum 1", "--momentum must lie in [0, 1)"),
    "gamma 0": ("--gamma 0", "--gamma must lie in (0, 1]"),
    "growing rate": ("--gamma 1.1", "--gamma must lie in (0, 1]"),
    "negative seed": ("--seed -1", "--seed must lie in [0, 2**32)"),
    "negative interval": ("--log-interval -1", "--log-interval must not be negative"),
    "target in percent": ("--target-accuracy 95", "--target-accuracy must be a fraction in (0, 1], got 95.0"),
    "target 0": ("--target-accuracy 0", "--target-accuracy must be a fraction"),
    "NaN target": ("--target-accuracy nan", "--target-accuracy must be a fraction"),
    "folder for digits": ("--data-dir .", "--data-dir and --download need --data mnist or fashion-mnist"),
    "download of digits": ("--download", "--data-dir and --download need --data mnist or fashion-mnist"),
    "file as output": (f"--out {__file__}", "File exists"),
    "output below a file": (f"--out {__file__}/run", "Not a directory"),
}


@pytest.mark.parametrize(("command", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_exits_2_with_one_line(capsys: Capture, command: str, message: str) -> None:
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("command", ["--epochs many", "--model vgg", "--lr fast", "--optimizer lion", "--what", "x"])
def test_parsing_error_exits_2_as_tyro_shows_it(capsys: Capture, command: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 2
    assert "For full helptext" in capsys.readouterr().err


def test_help_lists_each_models_own_defaults(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(default: digits cnn 15, net 20; mnist cnn 1, net 2)" in text
    assert all(f"--{name.replace('_', '-')}" in text for name in Config.__dataclass_fields__)


def test_out_with_a_run_in_it_is_refused(tmp_path: Path, capsys: Capture) -> None:
    command = ["--model", "net", "--epochs", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(command) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert json.loads((tmp_path / "config.json").read_text())["recipes"]["net"]["epochs"] == 1


def test_out_with_a_models_folder_in_it_is_refused(tmp_path: Path, capsys: Capture) -> None:
    weights = tmp_path / "net/model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"mine")
    assert main(["--epochs", "1", "--out", str(tmp_path)]) == 2
    assert "holds a run already: choose another folder" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [weights]
    assert weights.read_bytes() == b"mine"


@pytest.mark.parametrize("out", [[], ["--out", "runs"], ["--out", "runs/mine"]], ids=" ".join)
def test_folder_that_is_a_link_to_nowhere_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, out: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("gone")
    assert main(["--model", "net", "--epochs", "1", *out]) == 2
    assert capsys.readouterr().err == "error: runs is a link to gone, which is no folder: make it, or remove the link\n"


def test_flags_replace_the_recipe_and_another_optimizer_brings_its_rate() -> None:
    assert Config().recipe("net") == RECIPES["digits"]["net"]
    config = Config(optimizer="sgd", epochs=3, gamma=0.5)
    recipe = config.recipe("cnn")
    assert (recipe.optimizer, recipe.lr, recipe.momentum, recipe.epochs, recipe.gamma) == ("sgd", 0.01, 0.5, 3, 0.5)
    assert Config(optimizer="sgd", lr=0.2, momentum=0.0).recipe("cnn").momentum == 0.0
    assert Config(optimizer="adam").recipe("cnn") == RECIPES["digits"]["cnn"]


REAL = {
    "cnn": ("--optimizer adam --lr 1e-3 --batch-size 100 --epochs 1", 0.975),
    "net": ("--optimizer sgd --lr 0.01 --momentum 0.5 --batch-size 64 --epochs 2", 0.955),
}


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("JAXLOSS_DATA_DIR"), reason=NEEDS_DATA)
@pytest.mark.parametrize(("model", "command", "target"), [(model, *rest) for model, rest in REAL.items()], ids=REAL)
def test_real_mnist_reaches_the_target(tmp_path: Path, model: str, command: str, target: float) -> None:
    folder = os.environ["JAXLOSS_DATA_DIR"]
    command = f"--data mnist --data-dir {folder} --model {model} {command} --out {tmp_path}"
    process = start_training(*command.split(), cwd=tmp_path)  # compiled as for users
    output = process.communicate()
    assert process.returncode == 0, output
    last = rows(tmp_path / model)[-1]
    assert last["validation"]["images"] == 10000
    assert last["training"]["images"] == 60000
    assert last["validation"]["accuracy"] >= target
