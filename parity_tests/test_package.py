"""The wheel: what is in it, and that it works alone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import importlib.util, pathlib
import jax.numpy as jnp
import jaxloss
loss = jaxloss.cross_entropy(jnp.array([[20.0, 0.0, 0.0]]), jnp.array([0]))
assert 4.1e-9 < loss < 4.2e-9, loss
for name in ("torch", "flax", "optax", "train", "parity_tests"):
    assert importlib.util.find_spec(name) is None, name
assert (pathlib.Path(jaxloss.__file__).parent / "py.typed").exists()
print(jaxloss.__version__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT], check=True)
    (built,) = folder.glob("jaxloss-*.whl")
    return built


def test_wheel_ships_jaxloss_and_its_pytest_plugin_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "jaxloss",
        "_jaxloss_pytestplugin.py",
    }
    assert "jaxloss/py.typed" in names
    assert "jaxloss/parity/weights.py" in names
    templates = ("index.html.jinja", "report.html.jinja", "report.css", "report.js")
    assert {f"jaxloss/parity/templates/{name}" for name in templates} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_needs_jax_and_jaxtyping_alone(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert [line.split()[1].split(">")[0] for line in required] == ["jax", "jaxtyping"]
    train = [line for line in lines if line.startswith("Requires-Dist:") and "extra == 'train'" in line]
    assert train
    assert not any("torch" in line for line in train)
    replay, parity = (
        {line.split()[1].rstrip(";").split(">")[0] for line in lines if f"extra == '{extra}'" in line}
        for extra in ("replay", "parity")
    )
    assert "flax" in replay
    assert parity == replay | {"torch"}


def test_wheel_works_in_an_empty_environment(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", wheel], check=True)
    done = subprocess.run([python, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
