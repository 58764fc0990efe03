"""Every suite runs, and what it writes is what its tables and its pictures read."""

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from io import StringIO
from itertools import count, cycle
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from benchmarks import compiled, losses, plots, timing
from benchmarks.__main__ import ALL
from benchmarks.growth import curves
from benchmarks.hlo import collectives, traffic
from benchmarks.processes import in_new_processes
from benchmarks.timing import HAS_COMPILER, assert_same_answers, quartiles, spread, told
from benchmarks.train import SHARES, profiled

ROOT = Path(__file__).parents[1]
WIDTH = 300  # no table is narrowed
KINDS = {  # of rows: the keys that hold what is measured
    "losses": {"milliseconds", "temporaries"},
    "linear": {"milliseconds", "temporaries", "resident"},
    "train": {"milliseconds", SHARES, "sent"},
    "start": {"milliseconds"},
    "accuracy": {"seconds"},
}


def run_quick(suite: str, folder: Path, **environment: str) -> str:
    """What the command prints: wide, on one device and core, of programs that compile quickly, in one turn."""
    hidden = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    variables |= {"COLUMNS": str(WIDTH), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "OMP_NUM_THREADS": "1"} | environment
    options = ["--suite", suite, "--quick", "--turns", "1", "--json", folder, "--plot", folder]
    command = [sys.executable, "-m", "benchmarks", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("suite", KINDS)
def test_suite_runs_from_end_to_end(suite, tmp_path):
    compiles = suite == "losses" and HAS_COMPILER  # torch.compile takes long
    printed = run_quick(suite, tmp_path, **({} if compiles else {"CXX": "no-such-compiler"}))
    results = json.loads((tmp_path / f"{suite}-cpu.json").read_text())
    assert results["quick"]
    assert "figures are rough" in printed
    rows = results["rows"]
    assert {key for row in rows for key in row} >= KINDS[suite]
    assert ("torch.compile" in {name for row in rows for name in row.get("milliseconds", ())}) == compiles
    assert ("torch.compile is left out: it needs a C++ compiler" in printed) != compiles
    tables = import_module(f"benchmarks.{suite}").tables(rows)
    assert all(table.row_count > 0 for table in tables)
    console = Console(file=StringIO(), width=WIDTH)
    console.print(*tables)
    assert console.file.getvalue() in printed
    pictures = {path.name: path.read_bytes() for path in plots.draw(rows, tmp_path / "again", f"{suite}-cpu")}
    assert pictures
    assert pictures == {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    for row in rows:  # the gradients of all parameters, at least
        assert sum(row.get("sent", {}).values()) >= row.get("parameters", 0)


def test_a_profile_tells_programs_from_python():
    program = jax.jit(lambda x: x @ x).lower(jnp.ones((200, 200))).compile()
    assert profiled(lambda: time.sleep(0.01)) == 0
    assert 0 < profiled(lambda: program(jnp.ones((200, 200))).block_until_ready()) < 1


def test_all_runs_every_suite_but_accuracy():
    assert {*ALL, "accuracy"} == set(KINDS)


def test_what_would_compile_for_a_device_is_used_or_named(tmp_path):
    printed = run_quick("compiled", tmp_path)
    for target in compiled.TARGETS.values():
        shown = f"│ {target.name}" in printed or f"┃ {target.name}" in printed
        assert shown != (
            f"{target.name} is left out: it needs {target.package}: pip install 'jax[cuda12-local,tpu]'" in printed
        )


def test_committed_programs_are_of_both_devices_and_every_loss():
    rows = json.loads((ROOT / "benchmarks/results/compiled-cpu.json").read_text())["rows"]
    cases = {(row["loss"], row["of"], row["dtype"], tuple(row["shape"])) for row in rows}
    assert cases == set(compiled.cases(quick=False))
    assert len(rows) == 2 * len(cases)
    assert [table.row_count for table in compiled.tables(rows)] == [len(cases)] * 2


TIMED = sorted({*(ROOT / "benchmarks/results").glob("*.json")} - {ROOT / "benchmarks/results/compiled-cpu.json"})


@pytest.mark.parametrize("path", TIMED, ids=lambda path: path.stem)
def test_committed_results_are_no_rough_ones_and_can_be_drawn(path, tmp_path):
    results = json.loads(path.read_text())
    assert not results.get("quick")
    assert plots.draw(results["rows"], tmp_path, path.stem)


def test_other_answers_are_not_timed():
    answers = {"jaxloss": 1.0, "optax": 1.001, "PyTorch eager": 1.0}
    calls = {name: lambda value=value: [np.full(3, value, np.float32)] for name, value in answers.items()}
    with pytest.raises(AssertionError, match="optax"):
        assert_same_answers(calls)
    assert set(assert_same_answers(calls | {"optax": calls["jaxloss"]})) == set(answers)


@pytest.mark.parametrize(
    ("milliseconds", "least", "most", "figure"),
    [((0.25, 0.25, 9), 5, 20, 0.25), ((1,), 30, 32, 1), ((30,), 5, 5, 30), ((300,), 2, 2, 300)],
    ids=["one in three is slow", "short", "five do", "long"],
)
def test_a_turn_counts_as_the_median_of_its_calls(monkeypatch, milliseconds, least, most, figure):
    lasts, now, calls = cycle(milliseconds), [0.0], count()

    def call() -> None:
        next(calls)
        now[0] += next(lasts) / 1e3

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert timing.timings({"call": call}, 1)["call"] == [pytest.approx(figure)]
    assert least <= next(calls) <= most


def test_ratio_is_marked_where_the_middle_halves_overlap():
    times = {"ours": quartiles([1.0, 2.0, 3.0]), "near": quartiles([2.5, 3.0, 3.5]), "far": quartiles([7.0, 8.0, 9.0])}
    assert (told(times, "ours", "near"), told(times, "ours", "far"), told(times, "ours", "none")) == (
        "~0.67",
        "0.25",
        "",
    )
    assert spread(times, "ours", "far") == (1 / 9, 3 / 7)
    assert quartiles([2.0]) == {"q1": 2.0, "median": 2.0, "q3": 2.0}


def process(first):
    """Stands for a suite: the times are the process' number."""
    assert first, "asked to fail"
    yield {"shape": (2, 3), "milliseconds": {"jaxloss": [os.getpid()] * 2}}
    yield {"shape": (4, 5), "milliseconds": {"jaxloss": [first], "optax": [-2]}}


def test_times_of_several_processes_are_put_together():
    first, second = in_new_processes(2, process, -1)
    assert first["shape"] == (2, 3)
    assert second["milliseconds"] == {"jaxloss": [-1] * 2, "optax": [-2] * 2}
    one, again, other, _ = first["milliseconds"]["jaxloss"]
    assert len({os.getpid(), one, other}) == 3
    assert one == again
    with pytest.raises(SystemExit):
        in_new_processes(1, process, 0)


def test_losses_of_one_dtype_and_shape_have_processes_to_themselves(monkeypatch):
    runs = []
    monkeypatch.setattr(losses, "in_new_processes", lambda *run: runs.append(run) or [])
    assert not list(losses.measure(20, quick=False))
    assert {(count, measure, turns) for count, measure, _, turns in runs} == {(3, losses.measured, 6)}
    groups = [{case[2:] for case in some} for *_, some, _ in runs]
    assert all(len(group) == 1 for group in groups)
    assert len(set().union(*groups)) == len(groups)
    assert sorted(case for *_, some, _ in runs for case in some) == sorted(losses.cases(quick=False))


def test_slope_is_the_power_of_growth():
    shapes = [(64, 8, classes) for classes in (100, 200, 400)]
    rows = [{"shape": s, "along": "classes", "temporaries": {"square": s[2] ** 2, "constant": 7}} for s in shapes]
    square, constant = curves([*rows, {"shape": shapes[0], "temporaries": {"square": 1}}])
    assert square.slope == pytest.approx(2)
    assert constant.slope == pytest.approx(0)
    assert square.fixed == "64 tokens x 8 features"


def test_memory_that_no_process_took_more_of_is_drawn(tmp_path):
    rows = [{"shape": (64, 8, classes), "along": "classes", "resident": {"ours": 0}} for classes in (100, 200)]
    assert [path.name for path in plots.draw(rows, tmp_path, "memory")] == ["memory-resident-over-classes.svg"]


def test_bytes_of_collectives_are_those_of_their_results():
    class Compiled:
        def as_text(self) -> str:
            return """
  %a = (f32[5,5]{1,0}, bf16[3]{0}, pred[]) all-reduce(%x, %y, %z), to_apply=%add
  ROOT %b = s32[2,4]{1,0} all-gather-start(%c), metadata={op_name="jit(f)/while/body/g"}
  %d = f32[100]{0} add(%all-reduce.1, %e)
"""

    first, second = collectives(Compiled())
    assert (first.kind, first.sizes, first.bytes, first.in_loop) == ("all-reduce", [25, 3, 1], 100 + 6 + 1, False)
    assert (second.kind, second.sizes, second.bytes, second.in_loop) == ("all-gather", [8], 32, True)


PROGRAM = """
%gathering (param_0.1: bf16[4,8], param_1.1: s32[4,1]) -> f32[4] {
  %param_0.1 = bf16[4,8]{1,0} parameter(0)
  %convert.1 = f32[4,8]{1,0} convert(%param_0.1)
  %param_1.1 = s32[4,1]{1,0} parameter(1)
  ROOT %gather.1 = f32[4]{0} gather(%convert.1, %param_1.1), offset_dims={}
}

%gathering_and_adding (param_0.2: bf16[4,8]) -> bf16[4,8] {
  %param_0.2 = bf16[4,8]{1,0} parameter(0)
  %convert.2 = f32[4,8]{1,0} convert(%param_0.2)
  %gather.2 = f32[4,8]{1,0} gather(%convert.2, %param_0.2), offset_dims={}
  %add.2 = f32[4,8]{1,0} add(%gather.2, %convert.2)
  ROOT %convert.3 = bf16[4,8]{1,0} convert(%add.2)
}

%scattering (param_0.3: bf16[4,8], param_1.3: s32[4,1], param_2.3: bf16[4]) -> bf16[4,8] {
  %param_0.3 = bf16[4,8]{1,0} parameter(0)
  %param_1.3 = s32[4,1]{1,0} parameter(1)
  %param_2.3 = bf16[4]{0} parameter(2)
  ROOT %scatter.3 = bf16[4,8]{1,0} scatter(%param_0.3, %param_1.3, %param_2.3), to_apply=%add
}

ENTRY %main (x: bf16[4,8], t: s32[4,1]) -> (f32[4], bf16[4,8]) {
  %x = bf16[4,8]{1,0} parameter(0)
  %t = s32[4,1]{1,0} parameter(1)
  %a = f32[4]{0} fusion(%x, %t), kind=kLoop, calls=%gathering
  %b = bf16[4,8]{1,0} fusion(%x), kind=kLoop, calls=%gathering_and_adding
  %c = bf16[4]{0} convert(%a)
  %d = bf16[4,8]{1,0} fusion(%b, %t, %c), kind=kInput, calls=%scattering
  ROOT %e = (f32[4]{0}, bf16[4,8]{1,0}) tuple(%a, %d)
}
"""


def test_traffic_counts_no_array_of_which_single_elements_are_taken_or_put():
    gathering, adding, converting, scattering = 16 + 16, 64 + 64, 16 + 8, 16 + 8
    assert traffic(PROGRAM) == {"kernels": 4, "bytes": gathering + adding + converting + scattering}


def test_cycles_are_those_of_the_program_and_not_again_of_its_parts():
    text = '%part {\n "estimated_cycles":"7"\n}\n\nENTRY %main {\n "estimated_cycles":"5"\n "estimated_cycles":"6"\n}'
    assert compiled.cycles(text) == 11
