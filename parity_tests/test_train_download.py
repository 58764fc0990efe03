"""Downloads against a local server whose mirrors fail in every way. No test reaches a real mirror."""

import gzip
import hashlib
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from parity_tests.test_train_data import NEEDS_DATA, Capture, idx_bytes
from train import download
from train.__main__ import main
from train.config import DataName, UserError
from train.idx import NAMES, find

FILES = {f"{name}-ubyte.gz": gzip.compress(idx_bytes(name), mtime=0) for name in NAMES}
FILE = "t10k-labels-idx1-ubyte.gz"
requests: list[str] = []


class Mirrors(BaseHTTPRequestHandler):
    """/good/ serves the files; the other folders fail as they are called."""

    def do_GET(self) -> None:
        requests.append(self.path)
        _, mirror, file = self.path.split("/")
        content = FILES[file]
        self.send_response(404 if mirror == "missing" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write({"truncated": content[:-5], "wrong": content[::-1]}.get(mirror, content))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    requests.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Mirrors) as http:
        thread = Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def use(monkeypatch: pytest.MonkeyPatch, *mirrors: str) -> None:
    monkeypatch.setitem(download.MIRRORS, "mnist", mirrors)
    digests = tuple(hashlib.sha256(FILES[f"{name}-ubyte.gz"]).hexdigest() for name in NAMES)
    monkeypatch.setitem(download.ARCHIVES, "mnist", digests)


@pytest.mark.parametrize("fault", ["missing", "truncated", "wrong"])
def test_download_falls_to_the_second_mirror(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    use(monkeypatch, f"{server}/{fault}/", f"{server}/good/")
    files = download.download("mnist", tmp_path)
    assert {path.name: path.read_bytes() for path in files.values()} == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    assert requests == [f"/{mirror}/{name}-ubyte.gz" for name in NAMES for mirror in (fault, "good")]


def test_download_without_a_good_mirror_says_what_each_did(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, *(f"{server}/{fault}/" for fault in ("missing", "truncated", "wrong")), "http://127.0.0.1:1/")
    with pytest.raises(UserError, match="train-images-idx3-ubyte\\.gz: no mirror served it") as caught:
        download.download("mnist", tmp_path)
    for fault in ("404", "IncompleteRead", "does not match the known hash", "refused"):
        assert fault in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_command_downloads_once(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    use(monkeypatch, f"{server}/wrong/", f"{server}/good/")
    command = ["--data", "mnist", "--data-dir", str(tmp_path), "--model", "net", "--dry-run"]
    assert main(command) == 2
    assert "pass --data-dir or --download" in capsys.readouterr().err
    assert main(["--devices", "1", *command, "--download"]) == 0
    assert len(requests) == 8
    assert main(["--devices", "1", *command, "--download"]) == 0
    assert len(requests) == 8
    assert sorted(path.name for path in (tmp_path / "mnist").iterdir()) == sorted(FILES)


def test_command_reports_failed_downloads_in_one_line(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    use(monkeypatch, f"{server}/missing/")
    assert main(["--data", "mnist", "--data-dir", str(tmp_path), "--download"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: train-images-idx3-ubyte.gz: no mirror served it")
    assert not any("Traceback" in line for line in lines)


@pytest.mark.skipif(not os.environ.get("JAXLOSS_DATA_DIR"), reason=NEEDS_DATA)
@pytest.mark.parametrize("data", ["mnist", "fashion-mnist"])
def test_digests_are_those_of_the_published_archives(data: DataName) -> None:
    files = find(data, Path(os.environ["JAXLOSS_DATA_DIR"]))
    if any(path.suffix != ".gz" for path in files.values()):
        pytest.skip("JAXLOSS_DATA_DIR holds unpacked files: provide the .gz ones")
    assert download.ARCHIVES[data] == tuple(hashlib.sha256(files[name].read_bytes()).hexdigest() for name in NAMES)
