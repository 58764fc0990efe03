"""`python -m jaxloss.parity`: what it prints, and what it exits with."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from jaxloss.parity import Report
from jaxloss.parity.__main__ import main

ZOO = """
import torch
from flax import nnx
from jaxloss.parity import load_torch

torch.manual_seed(0)
original = torch.nn.Linear(4, 3)
number = 7


def port():
    return load_torch(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), original.state_dict())


def wrong():
    layer = port()
    layer.bias.set_value(layer.bias[...] + 1)
    return layer


def masked():
    layer = torch.nn.Linear(4, 3)
    layer.load_state_dict(original.state_dict())
    layer.register_buffer("mask", torch.ones(2))
    return layer


def untrusted():
    return load_torch(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), "untrusted.pt")


def broken():
    raise RuntimeError("no weights here")


def leaving():
    raise SystemExit(0)


def exiting():
    class Exiting(nnx.Linear):
        def __call__(self, x):
            raise SystemExit(0)

    return load_torch(Exiting(4, 3, rngs=nnx.Rngs(0)), original.state_dict())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pair.py").write_text(ZOO)
    random = np.random.default_rng(0)
    np.savez(tmp_path / "batch.npz", inputs=random.normal(size=(5, 4)).astype("float32"), targets=np.arange(5) % 3)
    np.savez(tmp_path / "other.npz", inputs=random.normal(size=(5, 4)).astype("float32"), extra=np.ones(2))
    np.savez(tmp_path / "several.npz", a=np.ones((5, 4)), b=np.ones((5, 4)))
    np.savez(tmp_path / "half.npz", a=np.ones((5, 4)), b=np.ones((5, 4)), flax_a=np.ones((5, 4)), targets=np.arange(5))
    np.savez(tmp_path / "words.npz", inputs=np.array(["a", "b"]))
    np.savez(tmp_path / "empty.npz")
    (tmp_path / "script.py").write_text("raise SystemExit(0)")
    np.savez(tmp_path / "pickled.npz", inputs=np.array([print], dtype=object))
    monkeypatch.chdir(tmp_path)
    for module in ("pair", "script"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["parity", *arguments])
    return main()


QUICK = ("--batch", "batch.npz", "--steps", "1", "--dtypes", "float64")


def test_equal_models_exit_0_and_the_report_is_written(folder, monkeypatch, capsys):
    files = "--json", "out.json", "--html", "out.html", "--junit", "out.xml"
    assert run(monkeypatch, "check", "pair:original", "pair:port", *QUICK, *files) == 0
    assert capsys.readouterr().out.startswith("ok: ")
    assert json.loads((folder / "out.json").read_text())["ok"] is True
    assert "Agrees with PyTorch" in (folder / "out.html").read_text()
    assert ElementTree.parse(folder / "out.xml").getroot().get("failures") == "0"


def test_report_is_told_even_where_it_cannot_be_written(folder, monkeypatch, capsys):
    def fail(self: Report, path: Path) -> None:
        raise OSError(f"no space left for {path}")

    monkeypatch.setattr(Report, "to_html", fail)
    assert run(monkeypatch, "check", "pair:original", "pair:port", *QUICK, "--html", "out.html") == 2
    told = capsys.readouterr()
    assert told.out.startswith("ok: ")
    assert "no space left for out.html" in told.err


@pytest.mark.parametrize("path", ["nowhere/out.html", "."], ids=["no folder", "a folder"])
def test_report_that_can_go_nowhere_is_refused_before_anything_is_compared(folder, monkeypatch, capsys, path):
    assert run(monkeypatch, "check", "pair:original", "pair:port", *QUICK, "--html", path) == 2
    told = capsys.readouterr()
    assert not told.out
    assert f"{path} cannot be written: " in told.err


def test_buffers_to_ignore_and_names_can_be_given(folder, monkeypatch, capsys):
    models = "check", "pair:masked", "pair:port", *QUICK
    assert run(monkeypatch, *models) == 1
    assert "mask has no counterpart in the port" in capsys.readouterr().out
    assert run(monkeypatch, *models, "--ignore", "mask", "--names", "weight", "weight") == 0


def test_pickle_that_would_run_code_is_refused(folder, monkeypatch, capsys):
    class Malice:
        def __reduce__(self) -> tuple:
            return Path.touch, (folder / "executed",)

    (folder / "untrusted.pt").write_bytes(pickle.dumps(Malice(), protocol=2))
    assert run(monkeypatch, "check", "pair:original", "pair:untrusted", *QUICK) == 2
    assert "refused" in capsys.readouterr().err
    assert not (folder / "executed").exists()


def test_different_models_exit_1_and_say_where(folder, monkeypatch, capsys):
    assert run(monkeypatch, "check", "pair:original", "pair:wrong", *QUICK) == 1
    assert "Linear: bias differs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("port", "batch", "says"),
    [
        ("pair:broken", "batch.npz", "RuntimeError: no weights here"),
        ("pair:missing", "batch.npz", "has no attribute 'missing'"),
        ("nowhere:port", "batch.npz", "No module named 'nowhere'"),
        ("script:port", "batch.npz", "script:port calls sys.exit: do that under"),
        ("pair:leaving", "batch.npz", "pair:leaving calls sys.exit: do that under"),
        ("pair:exiting", "batch.npz", "SystemExit: 0"),
        ("pair", "batch.npz", "should be module:attribute"),
        ("pair:number", "batch.npz", "gives a int, expected a flax.nnx.Module"),
        ("pair:original", "batch.npz", "expected a flax.nnx.Module"),
        ("pair:port", "missing.npz", "missing.npz"),
        ("pair:port", "several.npz", 'no "targets"'),
        ("pair:port", "empty.npz", "holds no inputs"),
        ("pair:port", "pickled.npz", "allow_pickle=False"),
        ("pair:port", "half.npz", "half.npz holds some inputs as flax_NAME, but no flax_b"),
        ("pair:port", "words.npz", "words.npz: inputs is of <U1, expected numbers"),
        ("pair:port", "pair.py", "pair.py is no .npz file"),
    ],
)
def test_what_cannot_be_compared_exits_2(folder, monkeypatch, capsys, port, batch, says):
    assert run(monkeypatch, "check", "pair:original", port, "--batch", batch) == 2
    error = capsys.readouterr().err
    assert error.startswith("Could not compare. ")
    assert says in error


def test_replay_takes_the_flax_inputs_of_a_batch_and_nothing_else(folder, monkeypatch, capsys):
    assert run(monkeypatch, "record", "pair:original", "batch.npz", "golden", "--steps", "0") == 0
    inputs = np.load("batch.npz")["inputs"]
    np.savez("flax.npz", flax_inputs=inputs)
    np.savez("both.npz", inputs=np.ones(3), flax_inputs=inputs, targets=np.ones(7))
    np.savez("wrong.npz", inputs=inputs, flax_inputs=inputs + 1)
    replay = "replay", "golden", "pair:port", "--batch"
    for batch, status in {"flax.npz": 0, "both.npz": 0, "wrong.npz": 1, "other.npz": 2}.items():
        assert run(monkeypatch, *replay, batch) == status, batch
    assert "other.npz holds no flax_NAME" in capsys.readouterr().err


def test_diff_compares_by_name(folder, monkeypatch, capsys):
    assert run(monkeypatch, "diff", "batch.npz", "batch.npz") == 0
    assert run(monkeypatch, "diff", "other.npz", "batch.npz") == 1
    out = capsys.readouterr().out
    assert "FAIL extra: only in other.npz" in out
    assert "FAIL targets: only in batch.npz" in out
    assert "FAIL inputs:" in out
    assert run(monkeypatch, "diff", "empty.npz", "batch.npz") == 2
    np.save("one.npy", np.ones(3))
    assert run(monkeypatch, "diff", "one.npy", "batch.npz") == 2
    assert "one.npy holds one array, expected an .npz file" in capsys.readouterr().err


def test_diff_compares_complex_arrays_as_two_parts(folder, monkeypatch, capsys):
    for name, z in {"ours": 1 + 2j, "theirs": 1 - 2j}.items():
        np.savez(f"{name}.npz", z=np.array([z, 3]))
    assert run(monkeypatch, "diff", "ours.npz", "ours.npz") == 0
    assert run(monkeypatch, "diff", "ours.npz", "theirs.npz") == 1
    assert "FAIL z.imag:" in capsys.readouterr().out


def test_diff_says_nothing_of_arrays_without_finite_elements(folder, monkeypatch, capsys):
    nothing = {"empty": np.ones((0, 3)), "undefined": np.full(3, np.nan)}
    np.savez("nothing.npz", **nothing)
    np.savez("some.npz", **nothing, **{"layer:key:0": np.ones(2)})
    assert run(monkeypatch, "diff", "nothing.npz", "nothing.npz") == 2
    assert run(monkeypatch, "diff", "some.npz", "some.npz") == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out
    assert "- undefined: no finite element: nothing was compared" in out
    assert "ok layer:key:0: 0 of its norm" in out


def test_structured_arrays_are_no_numbers(folder, monkeypatch, capsys):
    np.savez("pairs.npz", x=np.zeros(2, [("a", "f4"), ("b", "f4")]))
    assert run(monkeypatch, "diff", "pairs.npz", "pairs.npz") == 2
    assert "x is of [('a', '<f4'), ('b', '<f4')], expected numbers" in capsys.readouterr().err


def test_closed_pipe_changes_no_result(folder):
    np.savez("many.npz", **{f"array {i}": np.ones(2) for i in range(20_000)})
    diff = f"{sys.executable} -m jaxloss.parity diff many.npz many.npz"
    command = ["bash", "-c", f"{diff} | head -1 >/dev/null; echo ${{PIPESTATUS[0]}}"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (finished.stdout, finished.stderr) == ("0\n", "")


def test_doctor_names_what_matters(monkeypatch, capsys):
    assert run(monkeypatch, "doctor") == 0
    out = capsys.readouterr().out
    for word in ("jax_enable_x64", "JAX matmul", "PyTorch matmul", "denormals in XLA", "jnp.asarray", "threads"):
        assert word in out


def test_doctor_needs_no_torch(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises
    monkeypatch.delitem(sys.modules, "jaxloss.parity._doctor", raising=False)
    assert run(monkeypatch, "doctor") == 0
    out = capsys.readouterr().out
    assert "JAX matmul" in out
    assert "PyTorch" not in out


def test_command_runs_as_a_module(folder):
    command = [sys.executable, "-m", "jaxloss.parity", "diff", "batch.npz", "other.npz"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 1, finished.stderr
    assert "inputs" in finished.stdout


def test_importing_the_toolkit_loads_neither_torch_nor_flax():
    heavy = {"torch", "flax", "optax", "rich", "safetensors"}
    code = f"import sys, jaxloss.parity; assert not {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
