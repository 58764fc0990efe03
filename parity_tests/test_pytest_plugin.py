"""The pytest plugin in a small project of someone else's."""

import re
from pathlib import Path

import pytest

from _jaxloss_pytestplugin import Checked, Summary, _page_name
from parity_tests.commands import start_python

PORT = """
import torch
from flax import nnx
from jaxloss.parity import load_torch

def ported(**options):
    original = torch.nn.LayerNorm(4)
    return original, load_torch(nnx.LayerNorm(4, rngs=nnx.Rngs(0), **options), original.state_dict())

def check(parity, **options):
    return parity.check(*ported(**options), torch.randn(3, 4), steps=1, dtypes=["float64"])
"""
TESTS = """
from port import check, ported

def test_right(parity):
    from jaxloss import parity as toolkit
    assert check(parity, epsilon=1e-5).ok
    parity.judge(check(toolkit, epsilon=1e-5))

def test_wrong(parity):
    check(parity, epsilon=1e-6)

def test_recorded(parity, tmp_path):
    import torch
    from jaxloss.parity import record
    original, port = ported(epsilon=1e-5)
    record(tmp_path / "norm.safetensors", original, torch.randn(3, 4), steps=1, dtypes=["float64"])
    parity.replay(tmp_path / "norm.safetensors", port)

def test_without():
    pass
"""


def run_pytest(folder: Path, *options: str) -> tuple[int, str]:
    process = start_python("-m", "pytest", "-p", "no:cacheprovider", *options, cwd=folder)
    output, error = process.communicate(timeout=240)
    return process.returncode, output + error


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "port.py").write_text(PORT)
    (tmp_path / "test_port.py").write_text(TESTS)
    return tmp_path


def test_a_planted_fault_fails_with_its_reason_and_the_mended_port_passes(project: Path) -> None:
    status, output = run_pytest(project, "-n", "2", "--parity-report", "reports/parity")
    assert status == 1
    assert "1 failed, 3 passed" in output
    failure = output.partition("short test summary")[0]
    assert "The port's epsilon is 1e-06, PyTorch's 1e-05." in failure
    assert "_jaxloss_pytestplugin.py" not in failure, "the traceback ends in the test"
    assert re.search(
        r"parity: 1 of 4 checks failed, \d+ tensors, worst ratio .+ \(.+\), (\d+)/\1 mutants killed", output
    )
    index = (project / "reports/parity/index.html").read_text()
    pages = re.findall(r'<a href="(test_port\.py-test_\w+-\w{8}-\d\.html)">', index)
    names = [re.sub(r"^test_port\.py-test_|-\w{8}|\.html$", "", page) for page in pages]
    assert names[0] == "wrong-0"
    assert sorted(names[1:]) == ["recorded-0", "right-0", "right-1"]
    assert all("<h1>" in (project / "reports/parity" / page).read_text() for page in pages)
    (project / "test_port.py").write_text(TESTS.replace("1e-6", "1e-5"))
    status, output = run_pytest(project, "--parity-report", "reports/parity")
    assert status == 0, output
    assert re.search(r"parity: \d+ tensors, worst ratio 0\.\d+ \(.+, float64\), (\d+)/\1 mutants killed", output)
    assert "All 4 agree with PyTorch" in (project / "reports/parity/index.html").read_text()


RERUN = """
from _pytest.runner import runtestprotocol

def pytest_runtest_protocol(item, nextitem):
    runtestprotocol(item, log=False, nextitem=nextitem)
    runtestprotocol(item, log=True, nextitem=nextitem)
    return True
"""
ELSEWHERE = """
import port

attempts = []

def test_flaky(parity, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attempts.append(None)
    port.check(parity, epsilon=1e-6 if len(attempts) == 1 else 1e-5)
"""


def test_a_test_may_be_run_again_and_in_another_folder(project: Path) -> None:
    (project / "conftest.py").write_text(RERUN)
    (project / "test_port.py").write_text(ELSEWHERE)
    status, output = run_pytest(project, "--parity-report", "reports")
    assert status == 0, output
    assert "checks failed" not in output, "what the last run found is what counts"
    assert "The port agrees with PyTorch" in (project / "reports/index.html").read_text()
    assert len(list((project / "reports").glob("test_port.py-test_flaky-*-0.html"))) == 1


def test_page_is_named_after_file_and_test() -> None:
    for test, name in (
        ("tests/test_port.py::test_it[a/b]", "test_port.py-test_it-a-b-"),
        ("test_port.py::" + 200 * "\N{CJK UNIFIED IDEOGRAPH-4E00}", "test_port.py-"),
        ("tests/test_port.py::" + 200 * "x", "test_port.py-xxx"),
    ):
        page = _page_name(test, 0)
        assert page.startswith(name)
        assert len(page.encode()) < 100


def test_plugin_leaves_jax_alone_where_nothing_is_checked(project: Path) -> None:
    (project / "conftest.py").write_text("import sys\nassert not {'jax', 'torch', 'jaxloss'} & sys.modules.keys()\n")
    (project / "test_port.py").write_text("def test_nothing():\n    pass\n")
    status, output = run_pytest(project)
    assert status == 0, output
    assert "parity:" not in output


def test_folder_that_cannot_be_made_is_an_error_of_usage(project: Path) -> None:
    status, output = run_pytest(project, "--parity-report", "port.py/reports")
    assert status == 4
    assert "ERROR: --parity-report: " in output
    assert "Traceback" not in output


@pytest.mark.parametrize(("ratio", "said"), [(0.123, "0.12"), (5e3, "over 1000"), (float("inf"), "infinite")])
def test_line_names_the_worst(ratio: float, said: str) -> None:
    summary = Summary(None)
    for each in (ratio, 0.01):
        summary.checked.append(("test", Checked("Net", True, "", 7, each, f"at {each}", 2, 3, None)))
    assert summary.line() == f"parity: 14 tensors, worst ratio {said} (at {ratio}), 4/6 mutants killed"
