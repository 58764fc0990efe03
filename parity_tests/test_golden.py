"""Golden files: `replay` says what `check` says, without PyTorch; a file that is not as it was written is refused."""

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812

import jaxloss
from jaxloss import parity
from jaxloss.parity import _golden
from jaxloss.parity.__main__ import main
from jaxloss.parity._live import Live
from parity_tests.small import small
from parity_tests.without_torch import PORTS, port
from parity_tests.zoo import randomise

ROOT = Path(__file__).parents[1]


class TorchImages(nn.Module):
    """A convolution with batch norm and both kinds of dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.drop2d, self.fc = nn.Dropout2d(0.3), nn.Linear(4 * 4 * 3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop2d(F.relu(self.bn(self.conv(x))))
        return self.fc(self.drop(x.flatten(1)))


class TorchAttention(nn.Module):
    """One head of attention over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 11)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        y = self.norm(x)
        weights = F.softmax(self.query(y) @ self.key(y).transpose(-1, -2) / 8**0.5, dim=-1)
        return self.head((x + weights @ self.value(y))[:, -1])


ORIGINALS = {"images": TorchImages, "attention": TorchAttention}
BATCHES = {"images": lambda: torch.randn(6, 1, 6, 5), "attention": lambda: torch.randint(11, (6, 7))}
OPTIONS: dict[str, dict[str, Any]] = {
    "images": {"train": True, "steps": 2},
    "attention": {"steps": 1, "dtypes": ["float64"]},
}


def original(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(ORIGINALS[name]())


def batch(name: str) -> torch.Tensor:
    torch.manual_seed(1)
    return BATCHES[name]()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both originals' golden files and weights."""
    found = tmp_path_factory.mktemp("golden")
    for name in ORIGINALS:
        module = original(name)
        parity.record(found / f"{name}.safetensors", module, batch(name), **OPTIONS[name])
        save_file(
            {key: tensor.numpy() for key, tensor in module.state_dict().items()}, found / f"{name}-weights.safetensors"
        )
    return found


def compared(report: parity.Report) -> list[tuple[Any, ...]]:
    return [(f.place, f.quantity, f.dtype, f.error, f.bound, f.problem, f.negligible, f.kind) for f in report.findings]


def same(ours: parity.Report, theirs: parity.Report) -> None:
    """Everything but the notes and the reason."""
    assert compared(ours) == compared(theirs)
    for what in ("ok", "controls", "noise", "weight_map", "weights_compared"):
        assert getattr(ours, what) == getattr(theirs, what), what


@pytest.mark.parametrize("name", PORTS)
def test_replay_says_what_check_says_without_torch_too(folder, name):
    command = [sys.executable, "-m", "parity_tests.without_torch", folder, name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    for faulty in (False, True):
        ours = port(name, folder, faulty=faulty)
        expected = parity.check(original(name), ours, batch(name), **OPTIONS[name])
        replayed = parity.replay(folder / f"{name}.safetensors", ours)
        same(replayed, expected)
        assert replayed.ok is not faulty, str(replayed)
        assert any("recorded with torch" in note for note in replayed.notes)
        assert any("no PyTorch to ask" in note for note in replayed.notes) is faulty
        if name == "images" and faulty:  # what the arrays tell, replay tells too
            assert "divides the variance by n, PyTorch by n - 1" in replayed.first_divergence.diagnosis
            assert replayed.first_divergence == expected.first_divergence
        alone = json.loads((folder / f"{name}-{faulty}.json").read_text())
        outcomes = [(f.place, f.quantity, f.dtype, f.ok) for f in expected.findings]
        assert [(f["place"], f["quantity"], f["dtype"], f["ok"]) for f in alone["findings"]] == outcomes
        assert alone["controls"] == {"caught": expected.controls[0], "planted": expected.controls[1]}


def test_reason_is_told_where_the_arrays_tell_it(folder):
    transposed, right = (port("attention", folder) for _ in range(2))
    transposed.key.kernel.set_value(transposed.key.kernel[...].T)
    for ours, optimizer, place, says in (
        (transposed, None, "key", "The kernel's inputs and outputs are swapped."),
        (right, optax.adam(2e-3), "step 1", "The port's step is PyTorch's times 2"),
    ):
        found = parity.replay(folder / "attention.safetensors", ours, optimizer=optimizer)
        assert found.first_divergence.place == place
        assert found.first_divergence.diagnosis.startswith(says)


def half(outputs: Any, targets: Any) -> Any:
    return 0.5 * (F.cross_entropy if isinstance(outputs, torch.Tensor) else jaxloss.cross_entropy)(outputs, targets)


@pytest.mark.parametrize(
    "case", ["no loss", "probabilities", "own loss and optimizer", "bfloat16", "no steps", "given inputs"]
)
def test_replay_equals_check_with(case, tmp_path):
    module, ours = small()
    inputs, theirs, given = torch.randn(5, 4), {}, {}
    match case:
        case "no loss":
            theirs = {"losses": None}
        case "probabilities":
            inputs = inputs, torch.softmax(torch.randn(5, 3), 1)
        case "own loss and optimizer":
            sgd = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9)
            theirs = {"losses": (half, half), "optimizers": sgd}
            given = {"loss": half, "optimizer": sgd[1]}
        case "given inputs":
            given = {"flax_batch": inputs.numpy()}
    options: dict[str, Any] = {"steps": 0 if case == "no steps" else 2}
    options["dtypes"] = ["float64", "bfloat16"] if case == "bfloat16" else ["float64"]
    names = {"losses": "loss", "optimizers": "optimizer"}
    recorded = {names[what]: pair and pair[0] for what, pair in theirs.items()}
    parity.record(tmp_path / "file", module, inputs, **recorded, **options)
    replayed = parity.replay(tmp_path / "file", ours, **given)
    assert replayed.ok, str(replayed)
    same(replayed, parity.check(module, ours, inputs, given.get("flax_batch"), **theirs, **options))


def test_torchs_own_noise_is_recorded(tmp_path, monkeypatch):
    take_steps = Live._take_steps
    module, ours = small()
    inputs, late = torch.randn(5, 4), optax.sgd(lambda count: 0.1 + 1e-8 * (count > 0))

    def replay(noise: float) -> parity.Report:
        def noisy(live: Live, dtype: str, *, nudge: bool) -> Any:
            found, masks = take_steps(live, dtype, nudge=nudge)
            scale = 1 + noise * nudge
            return [{k: {n: a * scale for n, a in each.items()} for k, each in s.items()} for s in found], masks

        monkeypatch.setattr(Live, "_take_steps", noisy)
        sgd = torch.optim.SGD(module.parameters(), lr=0.1)
        parity.record(tmp_path / "file", module, inputs, optimizer=sgd, steps=2, dtypes=["float64"])
        return parity.replay(tmp_path / "file", ours, optimizer=late)

    assert replay(1e-8).ok
    assert replay(0.0).first_divergence.place == "step 2"


def test_counterparts_that_are_not_known_are_asked_for(tmp_path):
    module, ours = small()
    path, sgd = tmp_path / "file", torch.optim.SGD(module.parameters(), lr=0.1)
    options: dict[str, Any] = {"steps": 1, "dtypes": ["float64"]}
    for recorded, given, says in (
        ({"loss": half}, {}, "pass its JAX counterpart as loss="),
        ({"loss": None}, {"loss": half}, "recorded without a loss"),
        ({"optimizer": sgd}, {}, "recorded with SGD, given to record: pass its optax counterpart"),
    ):
        parity.record(path, module, torch.randn(5, 4), **recorded, **options)
        with pytest.raises(ValueError, match=says):
            parity.replay(path, ours, **given)


def test_file_is_the_same_twice_and_holds_what_it_needs_once(folder, tmp_path):
    parity.record(tmp_path / "again", original("images"), batch("images"), **OPTIONS["images"])
    assert (tmp_path / "again").read_bytes() == (folder / "images.safetensors").read_bytes()
    arrays = [(a.dtype.name, a.shape, a.tobytes()) for a in load_file(tmp_path / "again").values()]
    assert len(arrays) == len(set(arrays))
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    (tmp_path / "other").touch()
    assert (tmp_path / "again").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_file_says_nothing_of_the_process_that_wrote_it(tmp_path):
    (tmp_path / "file.part").write_text("another's")
    losses = [lambda outputs, targets: half(outputs, targets) for _ in range(2)]  # at two addresses
    torch.manual_seed(0)
    inputs = torch.randn(5, 4)
    for loss in losses:
        parity.record(tmp_path / "file", small()[0], inputs, loss=loss, steps=0, dtypes=["float64"])
        (tmp_path / "file").rename(tmp_path / f"{losses.index(loss)}")
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    assert (tmp_path / "file.part").read_text() == "another's"


def test_arrays_of_the_same_bytes_and_another_kind_are_kept_apart():
    arrays = _golden._Arrays()
    different = np.zeros(4), np.zeros((2, 2)), np.zeros(4, np.int64)
    references = arrays.pack([*different, np.zeros(4)], "a")
    assert references == [{"$array": f"a/{i}"} for i in (0, 1, 2, 0)]
    assert list(arrays.named) == ["a/0", "a/1", "a/2"]


def test_file_is_written_whole_or_not_at_all(tmp_path):
    class Broken(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("broken")

    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(RuntimeError, match="broken"):
        parity.record(path, Broken(4, 3), torch.randn(5, 4))
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("file", "before")]
    nowhere = tmp_path / "nowhere" / "file"
    with pytest.raises(
        FileNotFoundError, match=f"^{nowhere} cannot be written: there is no folder {nowhere.parent}\\.$"
    ):
        parity.record(nowhere, Broken(4, 3), torch.randn(5, 4))


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        (".", r"it is a folder, a device or a pipe\."),
        ("pipe", r"it is a folder, a device or a pipe\."),
        ("/proc/file", r"No such file or directory\."),
        ("a" * 250, r"File name too long\."),
    ],
)
def test_place_where_nothing_can_be_written_is_refused_before_anything_is_run(place, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    monkeypatch.setattr(Live, "recording", lambda *_: pytest.fail("it was run"))
    with pytest.raises(OSError, match=f"^{place} cannot be written: {reason}$"):
        parity.record(place, small()[0], torch.randn(5, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_file_is_written_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to("file")
    for _ in range(2):
        parity.record(tmp_path / "link", small()[0], torch.randn(5, 4), steps=0, dtypes=["float64"])
        assert (tmp_path / "link").is_symlink()
        assert _golden.read(tmp_path / "file")[1] == ["float64"]
    assert {path.name for path in tmp_path.iterdir()} == {"link", "file"}


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small golden file."""
    path = tmp_path_factory.mktemp("small") / "file"
    parity.record(path, small()[0], torch.randn(5, 4), steps=1, dtypes=["float64"])
    return path.read_bytes()


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[bytes], str]:
    """The line with which a file of these bytes is refused."""

    def refuse(content: bytes) -> str:
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="file") as caught:
            parity.replay(path, small()[1])
        assert len(str(caught.value).splitlines()) == 1
        return str(caught.value)

    return refuse


def signed(tmp_path: Path, content: bytes, edit: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> bytes:
    """A golden file with other content and a digest that fits it."""
    path = tmp_path / "signed"
    path.write_bytes(content)
    length = int.from_bytes(content[:8], "little")
    manifest = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["jaxloss.parity"])
    arrays = load_file(path)
    edit(manifest, arrays)
    _golden._save(path, arrays, json.dumps(manifest | {"sha256": "0" * 64}))
    return path.read_bytes()


def test_file_that_was_cut_off_is_refused(golden, refused):
    for size in (0, 7, 8, 100, len(golden) // 2, len(golden) - 1):
        assert "again, or record it anew" in refused(golden[:size])
    assert "its SHA-256 is another one" in refused(golden + b"\0")


def test_any_changed_byte_is_refused(golden, refused):
    positions = {*range(16), *range(0, len(golden), 23), len(golden) - 1}
    for where in sorted(positions):
        refused(golden[:where] + bytes([golden[where] ^ 1]) + golden[where + 1 :])
    length = int.from_bytes(golden[:8], "little")
    last = golden[:-1] + bytes([golden[-1] ^ 128])
    assert length + 8 < len(golden)
    assert "its SHA-256 is another one" in refused(last)


def test_header_that_is_too_long_is_refused_before_it_is_read(golden, refused, tmp_path):
    for length in (len(golden) - 7, 2**40, 2**64 - 1):
        assert "its header would have" in refused(length.to_bytes(8, "little") + golden[8:])
    path = tmp_path / "sparse"
    path.write_bytes((200 << 20).to_bytes(8, "little"))
    os.truncate(path, 300 << 20)
    tracemalloc.start()
    with pytest.raises(ValueError, match="its header would have 209715200 bytes"):
        _golden.read(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_other_version_is_refused_and_both_are_named(golden, refused, tmp_path):
    def edit(manifest: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        manifest["version"] = 7

    line = refused(signed(tmp_path, golden, edit))
    assert "of version 7" in line
    assert f"reads version {_golden.VERSION}" in line


def test_missing_array_and_malformed_manifest_are_refused(golden, refused, tmp_path):
    def without_array(manifest: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        del arrays["float64/calls/0/output"]

    def without_part(manifest: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        del manifest["modules"]

    def of_another_kind(manifest: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        manifest["recordings"]["float64"]["calls"] = 3

    def mask_too_large(manifest: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        arrays["bits"] = np.zeros(2, np.uint8)
        manifest["recordings"]["float64"]["masks"] = [{"shape": [2**40], "bits": {"$array": "bits"}}]

    assert "lacks the array float64/calls/0/output" in refused(signed(tmp_path, golden, without_array))
    for edit in (without_part, of_another_kind, mask_too_large):
        assert "a manifest that is not a golden file's" in refused(signed(tmp_path, golden, edit))


def others() -> Iterator[tuple[str, bytes]]:
    """Files that are no golden files."""
    yield "text", b"not a golden file, but long enough to have a header"
    for name, header in {
        "safetensors": json.dumps({"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
        "a list": "[1]",
        "no JSON": "{",
        "nested": "[" * 100_000,
        "not text": "\udcff",
        "no manifest": json.dumps({"__metadata__": {"jaxloss.parity": "3"}}),
        "unsigned": json.dumps({"__metadata__": {"jaxloss.parity": json.dumps({"version": 1, "sha256": "0"})}}),
    }.items():
        content = header.encode(errors="surrogateescape")
        yield name, len(content).to_bytes(8, "little") + content


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in others()])
def test_what_is_no_golden_file_is_refused(refused, content):
    assert "no golden file" in refused(content)


PAIR = """
import torch
from flax import nnx
from jaxloss.parity import load_torch

original = torch.nn.Linear(4, 3)


def port():
    return load_torch(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), original.state_dict())


def wrong():
    layer = port()
    layer.bias.set_value(layer.bias[...] + 1)
    return layer
"""


def test_commands_record_and_replay(tmp_path, monkeypatch, capsys):
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["parity", *arguments])
        return main()

    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "pair", raising=False)
    (tmp_path / "pair.py").write_text(PAIR)
    random = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    np.savez("batch.npz", inputs=random, targets=np.arange(5) % 3)
    np.savez("flax.npz", inputs=random, flax_inputs=2 * random)
    record = "record", "pair:original", "batch.npz", "golden.safetensors"
    assert run(*record, "--steps", "1", "--dtypes", "float64") == 0
    assert capsys.readouterr().out.startswith("golden.safetensors: ")
    assert run("replay", "golden.safetensors", "pair:port", "--json", "out.json") == 0
    assert json.loads(Path("out.json").read_text())["ok"] is True
    assert run("replay", "golden.safetensors", "pair:wrong") == 1
    assert "Linear: bias differs" in capsys.readouterr().out
    assert run("replay", "golden.safetensors", "pair:port", "--batch", "flax.npz") == 1
    capsys.readouterr()
    Path("golden.safetensors").write_bytes(Path("golden.safetensors").read_bytes()[:-1])
    assert run("replay", "golden.safetensors", "pair:port") == 2
    error = capsys.readouterr().err
    assert error.startswith("Could not compare. ValueError: golden.safetensors is not as it was recorded")
    assert len(error.splitlines()) == 1
    assert run(*record[:2], "missing.npz", "golden.safetensors") == 2
    assert capsys.readouterr().err.startswith("Could not record. FileNotFoundError: ")
