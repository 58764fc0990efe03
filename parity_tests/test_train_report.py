"""A run's report.html and TensorBoard events: whole, offline, alike from run to run, and true to metrics.jsonl."""

import base64
import json
import re
import shutil
import signal
import struct
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxloss import nll_loss
from parity_tests.test_train_data import Capture
from train import config
from train.__main__ import main
from train.data import DIGITS, Dataset, Split
from train.html import save_report
from train.loop import Epoch, Phase
from train.report import Monitor, Result, table

FLAGS = (
    "--devices",
    "1",
    "--model",
    "net",
    "--epochs",
    "2",
    "--schedule",
    "one-cycle",
    "--tensorboard",
    "--checkpoint-every",
    "30",
)
PHASES = ("training", "validation")
VOID = {"meta", "link", "img"}  # tags without an end
TABLES = re.compile(r'<div class="scrolling".*?</div>', re.DOTALL)
TIMING = re.compile(r'(<(\w+) class="timing">).*?(</\2>)')


class Page(HTMLParser):
    """A page's tags with their attributes and its texts by tag; every tag must be closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.texts[tag][-1] += data

    def table(self, label: str) -> list[list[str]]:
        """Its rows of cells."""
        (text,) = [text for text in TABLES.findall(self.source) if f'aria-label="{label}"' in text]
        rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in text.split("<tr>")[1:]]
        return [[re.sub("<[^>]*>", "", cell) for cell in row] for row in rows]


def untimed(run: Path) -> str:
    return TIMING.sub(r"\1\3", (run / "report.html").read_text())


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "net/metrics.jsonl").read_text().splitlines()]


def events(run: Path) -> dict[int, dict[str, float]]:
    """The scalars in the one file of events, by step; none comes twice."""
    (file,) = (run / "net/tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:
        (length,) = struct.unpack("<Q", data[:8])  # then its checksum, the record and the record's checksum
        event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
        for value in event.summary.value:
            scalars = found.setdefault(event.step, {})
            assert value.tag not in scalars
            scalars[value.tag] = value.simple_value
    return found


def assert_events_are_the_metrics(run: Path) -> None:
    """To float32, in which events keep scalars."""
    expected = {}
    for row in metrics(run):
        scalars = {f"{what}/{phase}": row[phase][what] for phase in PHASES for what in ("loss", "accuracy")}
        expected[row["epoch"]] = {tag: np.float32(value) for tag, value in {**scalars, "lr": row["lr"]}.items()}
    assert list(expected) == [1, 2]
    assert events(run) == expected


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert main([*FLAGS, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(run / "report.html")


def test_report_needs_nothing_from_outside_and_describes_its_pictures(page: Page) -> None:
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "embed"})
    addresses = [attrs[name] for _, attrs in page.tags for name in ("src", "href", "srcset") if name in attrs]
    assert all(address.startswith("data:") for address in addresses)
    assert not re.search(r"url\(|@import|https?:", page.source)
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    assert all(base64.b64decode(attrs["src"].split(",")[1]).startswith(b"\x89PNG") for attrs in pictures)
    assert all(len(attrs["alt"]) > 15 for attrs in pictures)
    assert page.texts["h2"] == ["Results", "net", "How it was made"]


def test_report_tells_what_the_metrics_tell(run: Path, page: Page) -> None:
    rows = metrics(run)
    accuracy = rows[-1]["validation"]["accuracy"]
    assert page.texts["title"] == [f"digits: net {accuracy:.2%}"]
    assert f"net {accuracy:.2%} of 360 test images right" in page.texts["p"]
    headings, cells = page.table("results")
    assert headings[:5] == ["model", "loss", "parameters", "test accuracy", "epochs"]
    assert cells[:5] == ["net", "nll_loss", "21,840", f"{accuracy:.2%}", "2/2"]
    for row, cells in zip(rows, page.table("epochs of net")[2:], strict=True):
        numbers = [(f"{row[phase]['loss']:.4f}", f"{row[phase]['accuracy']:.2%}") for phase in PHASES]
        assert cells[:-1] == [str(row["epoch"]), f"{row['lr']:.3g}", *numbers[0], *numbers[1]]
    alt = next(attrs["alt"] for tag, attrs in page.tags if tag == "img")
    first, last = (f"{row['validation']['loss']:.4f}" for row in rows)
    assert alt.endswith(f"validation from {first} to {last}")


def test_report_counts_every_mistake_and_shows_the_worst(run: Path, page: Page) -> None:
    counts = np.array([[int(cell or 0) for cell in row[1:]] for row in page.table("confusion matrix of net")[1:]])
    assert counts.shape == (10, 10)
    assert counts.sum() == 360
    assert np.trace(counts) / 360 == pytest.approx(metrics(run)[-1]["validation"]["accuracy"])
    assert f"{360 - np.trace(counts)} mistakes, the worst first" in page.texts["h3"]
    captions = page.texts["figcaption"]
    assert len(captions) == min(12, 360 - np.trace(counts))
    assert all(counts[int(true), int(seen)] for true, seen in (c.split(" seen as ") for c in captions))


def test_report_says_how_it_was_made(run: Path, page: Page) -> None:
    about = json.loads((run / "config.json").read_text())
    recipe = {name.replace("_", " "): str(value) for name, value in about["recipes"]["net"].items()}
    assert dict(page.table("recipes")[1:]) == recipe
    assert recipe["schedule"] == "one-cycle"
    versions = dict(page.table("versions"))
    assert versions == {**about["versions"], "device": about["device"], "seed": "0", "random numbers": "torch"}


def test_two_runs_of_one_command_differ_in_timing_alone(run: Path, tmp_path: Path) -> None:
    assert main([*FLAGS, "--out", str(tmp_path)]) == 0
    assert untimed(tmp_path) == untimed(run)
    assert len(TIMING.findall(untimed(run))) == 3 + 2  # columns of the results, and the epochs
    assert 0 < len((run / "report.html").read_text()) - len(untimed(run)) < 50, "nothing else is left out"


def test_resumed_run_reports_and_logs_as_if_never_killed(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)  # its events know of epoch 2, its checkpoints now do not
    (tmp_path / "report.html").unlink()
    shutil.rmtree(max((tmp_path / "net/checkpoints").glob("[0-9]*"), key=lambda path: int(path.name)))
    assert main(["--resume", str(tmp_path)]) == 0
    assert untimed(tmp_path) == untimed(run)
    assert_events_are_the_metrics(tmp_path)


def test_events_are_the_metrics(run: Path) -> None:
    assert_events_are_the_metrics(run)


def test_interrupted_run_reports_what_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Monitor, "epoch", lambda *_: signal.raise_signal(signal.SIGINT))
    assert main(["--devices", "1", "--epochs", "2", "--model", "net", "--out", str(tmp_path)]) == 130
    page = Page(tmp_path / "report.html")
    assert "nll_loss, 1 of 2 epochs" in page.texts["p"]
    assert len(page.table("epochs of net")) == 2 + 1
    assert not (tmp_path / "net/tensorboard").exists()


def test_tensorboard_without_its_package_is_one_line_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(config, "find_spec", lambda name: None)
    assert main([*FLAGS, "--out", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: --tensorboard needs tensorboardX: pip install -e '.[tensorboard]'\n")
    assert not (tmp_path / "run").exists()


def test_report_escapes_names_and_praises_a_model_without_mistakes(tmp_path: Path) -> None:
    about = {"data": "<digits>", "recipes": {"net": {"lr": "<i>"}}, "versions": {"&": "1"}, "device": "", "seed": 0}
    (tmp_path / "config.json").write_text(json.dumps({**about, "rng": "jax"}))
    split = Split(np.zeros((2, 28, 28), np.uint8), np.array([0, 1], np.uint8))
    phase = Phase(steps=1, images=2, cost=0.5, loss=0.5, accuracy=1.0, seconds=1.0)
    learner: Any = SimpleNamespace(
        model="net", loss=nll_loss, parameters=1, compile_seconds=0.0, recipe=SimpleNamespace(epochs=1)
    )
    results = [Result(learner, [Epoch(1, 0.1, phase, phase)], np.eye(2))]
    save_report(tmp_path / "report.html", results, Dataset(split, split, ("<b>", *DIGITS[:1]), "a & b"))
    page = Page(tmp_path / "report.html")
    assert "No mistake" in page.texts["h3"]
    assert not {"b", "i", "digits"} & {tag for tag, _ in page.tags}
    assert "a & b" in page.texts["p"]
    shown = [str(cell) for column in table(results).columns for cell in column.cells]
    assert page.table("results")[1] == shown
