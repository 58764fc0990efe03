"""The suite's own soundness: gates that fail on faults, imports that point one way, complete docstrings."""

import ast
import inspect
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxloss
from benchmarks import accuracy
from benchmarks.linear import CHUNKED, SLABS, WHOLE
from benchmarks.losses import BOTH, COMPILED, EAGER, OPTAX, OURS, SHAPES, VALUE
from benchmarks.timing import ratio
from benchmarks.train import OURS as TRAIN
from benchmarks.train import SHARES, TUTORIAL
from jaxloss import parity
from jaxloss.parity._faults import classify
from parity_tests.gates import (
    assert_errors_within_ratio,
    assert_float64_close,
    assert_identical,
    assert_same_structure,
    relative_l2,
)

ROOT = Path(__file__).parents[1]
GOOD = np.random.default_rng(0).normal(size=(5, 7))


def perturbed(index: tuple[int, int], value: float) -> np.ndarray:
    x = GOOD.copy()
    x[index] = value
    return x


FAULTS = {
    "one element off": GOOD * (1 + 1e-9 * (np.arange(35).reshape(5, 7) == 3)),
    "sign": -GOOD,
    "scaled": GOOD * (1 + 1e-11),
    "rows permuted": GOOD[::-1].copy(),
    "NaN on one side": perturbed((0, 0), np.nan),
    "inf on one side": perturbed((0, 0), np.inf),
    "other shape": GOOD.ravel(),
    "other dtype": GOOD.astype(np.float32),
    "zeros": np.zeros_like(GOOD),
    "other keys": {"a": GOOD},
    "empty": np.zeros((0,)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_float64_and_identity_gates_fail_on(fault):
    for gate in (assert_float64_close, assert_identical):
        gate(GOOD, GOOD.copy())
        with pytest.raises(AssertionError):
            gate(FAULTS[fault], GOOD)


@pytest.mark.parametrize("fault", ["NaN on one side", "inf on one side", "other shape", "other dtype", "other keys"])
def test_structure_gate_fails_on(fault):
    assert_same_structure(GOOD, -GOOD)
    with pytest.raises(AssertionError):
        assert_same_structure(FAULTS[fault], GOOD)


def test_gates_fail_when_there_is_nothing_to_compare():
    for gate in (assert_float64_close, assert_identical, assert_same_structure):
        with pytest.raises(AssertionError, match="nothing"):
            gate({}, {})


def test_nan_and_inf_at_the_same_places_pass():
    for value in (np.nan, np.inf, -np.inf):
        assert_float64_close(perturbed((1, 2), value), perturbed((1, 2), value))
    with pytest.raises(AssertionError):
        assert_float64_close(perturbed((1, 2), np.inf), perturbed((1, 2), -np.inf))


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_ratio_gate_fails_on_three_times_the_error(factor):
    exact = np.random.default_rng(1).normal(size=4000)
    error = np.random.default_rng(2).normal(size=4000) * 1e-5
    cases = [((exact + factor * error).astype(np.float32), (exact + error).astype(np.float32), exact)]
    with nullcontext() if factor == 1.0 else pytest.raises(AssertionError, match="rmse"):
        assert_errors_within_ratio(cases)


def test_ratio_gate_sees_a_small_array_beside_a_large_one():
    exact = {"large": 1e3 * np.arange(1.0, 9), "small": 1e-6 * np.arange(1.0, 9)}
    rounded = {name: array.astype(np.float32) for name, array in exact.items()}
    parity.assert_close(rounded, rounded, oracle=exact)
    with pytest.raises(AssertionError, match="rmse"):
        parity.assert_close(rounded | {"small": np.zeros(8, np.float32)}, rounded, oracle=exact)


def test_assert_close_takes_booleans_integers_and_tensors_and_refuses_nothing_but_nan():
    parity.assert_close(
        {"mask": GOOD > 0, "count": np.arange(3)}, {"mask": torch.tensor(GOOD > 0), "count": torch.arange(3)}
    )
    for wrong in ({"mask": GOOD < 0, "count": np.arange(3)}, {"mask": GOOD > 0, "count": np.arange(3) + 1}):
        with pytest.raises(AssertionError):
            parity.assert_close(wrong, {"mask": GOOD > 0, "count": np.arange(3)})
    with pytest.raises(AssertionError, match="nothing was compared"):
        parity.assert_close(np.full(3, np.nan), np.full(3, np.nan))


def test_ratio_gate_needs_a_float64_oracle():
    x = GOOD.astype(np.float32)
    with pytest.raises(ValueError, match="oracle"):
        assert_errors_within_ratio([(x, x, x)])


@pytest.mark.parametrize(
    ("theirs", "oracle"),
    [(1, np.nan), (1, np.inf), (np.nan, 1), (np.nan, np.inf), (np.inf, np.nan), (np.inf, -np.inf)],
)
def test_oracle_that_is_not_finite_where_the_results_are_is_refused(theirs, oracle):
    results = np.array([2, theirs], np.float32)
    parity.assert_close(results, results, oracle=results.astype(np.float64))
    with pytest.raises(ValueError, match=r"must be NaN where both results are, and finite where they are"):
        parity.assert_close(results, results, oracle=np.array([2.0, oracle]))


def test_oracle_may_be_finite_where_half_precision_overflows():
    results = np.array([2, np.inf], np.float16)
    parity.assert_close(results, results, oracle=np.array([2, 1e6]))
    with pytest.raises(AssertionError, match="rmse"):
        parity.assert_close(results + np.array([1, 0], np.float16), results, oracle=np.array([2, 1e6]))


def test_shapes_of_empty_arrays_are_compared():
    arrays = {"x": GOOD, "empty": np.zeros((0, 3))}
    parity.assert_close(arrays, arrays)
    for wrong in (np.zeros((5, 0)), np.zeros((0, 3), np.float32), np.zeros((2, 3))):
        with pytest.raises(AssertionError, match=r"\['empty'\] has (shape|dtype)"):
            parity.assert_close(arrays | {"empty": wrong}, arrays)


@pytest.mark.parametrize("scale", [1e-310, 1e-170, 1e160, 1e300])
def test_numbers_whose_squares_underflow_or_overflow_are_compared(scale):
    theirs = scale * np.array([3.0, -9.0])
    parity.assert_close(theirs * (1 + 1e-15), theirs)
    for wrong in (scale * np.array([1.0, 2.0]), theirs * (1 + 1e-10)):
        with pytest.raises(AssertionError, match="of its norm"):
            parity.assert_close(wrong, theirs)
    assert relative_l2(2 * theirs, theirs) == pytest.approx(1)
    assert relative_l2(np.array([np.inf]), np.ones(1)) == np.inf


CLASSES = {
    "layout": GOOD[::-1],
    "scale": -3 * GOOD,
    "precision": GOOD * (1 + 1e-7 * np.random.default_rng(1).normal(size=GOOD.shape)),
    "localised": perturbed((3, 4), 2e5),
    "semantic": np.random.default_rng(2).normal(size=GOOD.shape),
}


@pytest.mark.parametrize("scale", [1e-310, 1e-170, 1e160, 1e300])
@pytest.mark.parametrize("kind", CLASSES)
def test_class_of_a_difference_is_told_where_squares_underflow_or_overflow(kind, scale):
    fault = classify(scale * CLASSES[kind], scale * GOOD)
    assert fault == classify(CLASSES[kind], GOOD)
    assert fault.kind == kind
    with pytest.raises(AssertionError, match=f"\n  {kind}"):
        parity.assert_close(scale * CLASSES[kind], scale * GOOD)


@pytest.mark.parametrize(
    ("ours", "theirs", "kind"),
    [
        (1e200 * GOOD, GOOD, "scale"),
        (1e-200 * GOOD, GOOD, "scale"),
        (1e200 * GOOD, 1e-200 * GOOD, "semantic"),  # no float64 is the factor
        (1e308 * np.sign(GOOD), 2e307 * np.sign(GOOD), "semantic"),  # nor the norm
        (perturbed((1, 2), 1e200), GOOD, "localised"),
        (perturbed((1, 2), np.nan), GOOD, "semantic"),
        (perturbed((1, 2), np.inf), perturbed((1, 2), np.inf), "semantic"),
    ],
)
def test_class_of_a_difference_between_sizes_or_beside_what_is_not_finite(ours, theirs, kind):
    assert classify(ours, theirs).kind == kind


def test_complex_arrays_are_compared_as_two_parts():
    exact = {"z": GOOD + 1j * GOOD[::-1], "t": torch.tensor(GOOD) * 1j}
    rounded = {name: np.asarray(array).astype(np.complex64) for name, array in exact.items()}
    parity.assert_close(exact, exact)
    parity.assert_close(rounded, rounded, oracle=exact)
    for wrong, part in ((exact["z"].conj(), "imag"), (exact["z"] * (1 + 1e-9), "real"), (-exact["z"], "real")):
        with pytest.raises(AssertionError, match=rf"\['z'\]\.{part} differs"):
            parity.assert_close(exact | {"z": wrong}, exact)
    with pytest.raises(AssertionError, match="rmse"):
        parity.assert_close(rounded | {"z": rounded["z"].conj()}, rounded, oracle=exact)
    with pytest.raises(AssertionError, match="keys differ"):
        parity.assert_close(exact | {"z": GOOD}, exact)


def test_integers_of_another_width_pass_and_none_is_no_leaf():
    parity.assert_close({"x": GOOD, "n": np.arange(3, dtype=np.int32)}, {"x": GOOD, "n": np.arange(3), "none": None})


def test_relative_l2_sees_a_permutation():
    assert relative_l2(GOOD, GOOD) == 0
    assert relative_l2(GOOD[::-1], GOOD) > 0.5


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(folder: str, *, without: str = "\0") -> list[Path]:
    found = [p for p in (ROOT / folder).rglob("*.py") if without not in str(p.relative_to(ROOT))]
    assert found
    return found


NEED_TORCH = {"originals", "twin", "twins", "export"}


def test_imports_point_one_way():
    for path in files("jaxloss", without="parity"):
        outside = {n.split(".")[0] for n in imported(path)} - {"jaxloss", "jax", "jaxtyping", "numpy"}
        assert outside <= sys.stdlib_module_names, f"{path}: {outside}"
        assert not any(n.startswith("jaxloss.parity") for n in imported(path)), path
    for path in files("jaxloss/parity"):
        assert not any(n.split(".")[0] in ("train", "parity_tests") for n in imported(path)), path
    for path in files("train"):
        names = imported(path)
        foreign = {"parity_tests"} if path.stem in NEED_TORCH else {"parity_tests", "torch"}
        assert not any(n.split(".")[0] in foreign for n in names), path
        assert not NEED_TORCH & {n.removeprefix("train.") for n in names} or path.stem in NEED_TORCH, path
        assert not any("._" in n for n in names if n.startswith("jaxloss")), f"{path}: a private name of jaxloss"


def test_checks_import_nothing_of_ours():
    assert not any(n.startswith("jaxloss") for n in imported(ROOT / "jaxloss" / "_checks.py"))


def test_no_private_jax_import():
    for path in [*files("jaxloss"), *files("train")]:
        assert not any(n.startswith(("jax._src", "jaxlib")) for n in imported(path)), path


def test_importing_jaxloss_loads_nothing_heavy():
    heavy = ["torch", "flax", "optax", "jax.experimental.pallas", "train", "jaxloss.parity"]
    code = f"import sys, jaxloss; sys.exit(' '.join(m for m in {heavy} if m in sys.modules) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


FUNCTIONS = ["log_softmax", "nll_loss", "cross_entropy", "kl_div", "linear_cross_entropy", "linear_log_prob"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_function_has_a_complete_docstring(name):
    function = getattr(jaxloss, name)
    text = inspect.getdoc(function)
    order = [
        text.find(part)
        for part in ("nats", ".. math::", "Args:", "Returns:", "Raises:", "Edge values:", "Examples:", "References:")
    ]
    assert all(place >= 0 for place in order), order
    assert order == sorted(order)
    arguments = text[text.index("Args:") : text.index("Returns:")]
    for parameter in inspect.signature(function).parameters:
        assert f"{parameter}: " in arguments, parameter


def test_every_public_name_has_a_docstring():
    for name in set(jaxloss.__all__) - {"__version__"}:
        assert len(inspect.getdoc(getattr(jaxloss, name))) > 40, name


def test_signatures_are_the_public_contract():
    from inspect import signature

    def keywords(f):
        parameters = signature(f).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    assert keywords(jaxloss.log_softmax) == {"axis": -1, "dtype": None}
    shared = {"weight": None, "ignore_index": -100, "reduction": "mean"}
    assert keywords(jaxloss.nll_loss) == shared | {"axis": -1}
    extra = {"label_smoothing": 0.0, "z_loss": 0.0, "axis": -1, "class_axis_name": None, "dtype": None}
    assert keywords(jaxloss.cross_entropy) == shared | extra
    assert keywords(jaxloss.kl_div) == {"log_target": False, "reduction": "mean"}
    own = {"linear_bias": None, "logit_softcap": None, "memory_budget": None, "ignore_index": None}
    assert keywords(jaxloss.linear_cross_entropy) == {k: v for k, v in (shared | extra | own).items() if k != "axis"}
    assert keywords(jaxloss.linear_log_prob) == {
        "linear_bias": None,
        "ignore_index": -100,
        "logit_softcap": None,
        "temperature": None,
        "class_axis_name": None,
        "memory_budget": None,
    }
    assert jaxloss.nll is jaxloss.nll_loss


def test_readme_example_trains():
    text = (ROOT / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(code, names)  # ours: the block that readers run
    for _ in range(20):
        names["params"], names["state"], loss = names["step"](names["params"], names["state"])
    assert loss < names["loss"]


def test_readme_gives_the_two_commands_and_the_check_line():
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    assert lines[3] == "pip install -e '.[train]' && python -m train"
    assert "pip install -e '.[test]' && pytest" in lines
    assert "ruff format --check . && ruff check . && pyright && pytest" in lines


def test_private_functions_are_type_checked_under_pytest_and_public_ones_are_not():
    with pytest.raises(Exception, match="Type-check error"):
        jaxloss._nll.reduce_rows(jnp.ones(3, int), jnp.ones(3), "mean", weighted=False)
    with pytest.raises(TypeError, match="cross_entropy: logits must be floating, got int32"):
        jaxloss.cross_entropy(jnp.ones((2, 3), int), jnp.array([0, 1]))


def readme_part(name: str) -> str:
    """The README's text between `<!-- name -->` and `<!-- /name -->`."""
    return (ROOT / "README.md").read_text().split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]


def committed(suite: str, platform: str = "cpu") -> list[dict]:
    return json.loads((ROOT / f"benchmarks/results/{suite}-{platform}.json").read_text())["rows"]


@pytest.mark.parametrize(("part", "platform"), [("speed", "cpu"), ("gpu", "gpu")])
def test_readme_speeds_are_those_of_the_committed_results(part, platform):
    rows = [r for r in committed("losses", platform) if (r["loss"], r["of"]) == ("cross_entropy", BOTH)]
    single, half = ([row for row in rows if row["dtype"] == dtype] for dtype in ("float32", "bfloat16"))
    expected = []
    for pair in zip(single, half, strict=True):
        cells = [" x ".join(map(str, pair[0]["shape"]))]
        assert pair[0]["shape"] == pair[1]["shape"]
        for peer in (OPTAX, EAGER, COMPILED):
            cells.append("{} ({})".format(*(ratio(row["milliseconds"], OURS, peer) for row in pair)))
        expected.append(f"| {' | '.join(cells)} |")
    assert len(expected) == len(SHAPES)
    assert readme_part(part).strip().splitlines()[2:] == expected


def test_readme_cost_of_a_start_on_a_gpu_is_that_of_the_committed_results():
    every = committed("losses", "gpu")
    starts = [
        row["milliseconds"]["x + 1"]["median"] for row in every if row["of"] == BOTH and row["shape"] == [128, 10]
    ]
    rows = [row for row in every if (row["loss"], row["of"]) == ("cross_entropy", VALUE)]
    small = [row["milliseconds"] for row in rows if math.prod(row["shape"]) <= 1024 * 1000]
    ratios = [times[OURS]["median"] / times[EAGER]["median"] for times in small]
    found = re.findall(r"\d\.\d+", readme_part("gpu-start"))
    assert found == [f"{min(starts):.2f}", f"{max(starts):.2f}", f"{min(ratios):.1f}", f"{max(ratios):.1f}"]


def test_readme_cost_of_a_start_on_a_cpu_is_that_of_the_committed_results():
    rows = [row for row in committed("losses") if (row["loss"], row["of"]) == ("cross_entropy", BOTH)]
    ratios = [ratio(row["milliseconds"], "x + 1", EAGER) for row in rows if row["shape"] == [128, 10]]
    assert readme_part("cpu-start") == "{} ({})".format(*ratios)


def test_readme_speed_with_a_confident_row_is_that_of_the_committed_results():
    rows = [row["milliseconds"] for row in committed("losses") if "confident" in row["loss"]]
    ratios = sorted((ratio(times, OURS, OPTAX) for times in rows), key=float)
    assert readme_part("confident") == f"{ratios[0]} to {ratios[-1]}"


def test_readme_speed_with_the_classes_on_axis_1_is_that_of_the_committed_results():
    rows = [row for row in committed("losses") if row["loss"].endswith("axis 1") and row["of"] == BOTH]
    expected = [ratio(row["milliseconds"], OURS, peer) for peer in (OPTAX, EAGER) for row in rows]
    assert re.findall(r"\d\.\d\d", readme_part("axis-1")) == expected


def test_readme_memory_and_time_of_linear_cross_entropy_are_those_of_the_committed_results():
    rows = committed("linear")
    expected = [
        "| {} | {:.0f} MiB | {:.0f} MiB |".format(
            " x ".join(map(str, row["shape"])), *(row["temporaries"][name] / 2**20 for name in (SLABS, WHOLE))
        )
        for row in rows
        if "temporaries" in row
    ]
    assert readme_part("memory").strip().splitlines()[2:] == expected
    times = [row["milliseconds"] for row in rows if "milliseconds" in row and "along" not in row]
    ratios = [ratio(t, SLABS, peer) for t in times for peer in (WHOLE, EAGER, CHUNKED)]
    assert len(ratios) == 6
    assert re.findall(r"\d+\.\d+", readme_part("time")) == ratios


def test_readme_gpu_times_of_linear_cross_entropy_are_those_of_the_committed_results():
    timed = [row for row in committed("linear", "gpu") if "milliseconds" in row and "along" not in row]
    times = [row["milliseconds"] for row in timed if row["of"] == "value and gradients"]
    expected = [ratio(t, SLABS, peer) for t in times for peer in (WHOLE, EAGER, COMPILED)]
    assert re.findall(r"\d+\.\d+", readme_part("gpu-time")) == expected


def test_readme_programs_are_those_of_the_committed_results():
    every = [row for row in committed("compiled") if (row["loss"], row["of"]) == ("cross_entropy", BOTH)]

    def arrays(name: str) -> Callable[[dict], str]:
        return lambda row: f"{row['bytes'][name] / math.prod(row['shape']) / jnp.dtype(row['dtype']).itemsize:.1f}"

    def cycles(row: dict) -> str:
        return f"{row['cycles'][OURS] / row['cycles'][OPTAX]:.2f}"

    columns = ("H100", arrays(OURS)), ("H100", arrays(OPTAX)), ("TPU v5e", cycles)
    lines = readme_part("compiled").strip().splitlines()[2:]
    for line, shape in zip(lines, SHAPES, strict=True):
        same = [row for row in every if tuple(row["shape"]) == shape]
        cells = ["{} ({})".format(*(tell(row) for row in same if row["device"] == device)) for device, tell in columns]
        assert line == f"| {' x '.join(map(str, shape))} | {' | '.join(cells)} |"


def test_readme_seconds_to_an_accuracy_are_those_of_the_committed_results():
    (table,) = accuracy.tables(committed("accuracy", "gpu"))
    _, names, reached, seconds, _, per_epoch, compiling = (list(column.cells) for column in table.columns)
    expected = {
        name: [time, count.replace("/", " of "), epoch, compile_time]
        for name, time, count, epoch, compile_time in zip(names, seconds, reached, per_epoch, compiling, strict=True)
    }
    lines = [line.strip("| ").split(" | ") for line in readme_part("accuracy").strip().splitlines()[2:]]
    assert {name.strip("`"): cells for name, *cells in lines} == expected


def test_readme_distance_of_float32_trainings_is_that_of_the_committed_tables():
    tables = (ROOT / "docs/porting/same-seed.md").read_text()
    medians = re.findall(r"Median of the first over the second: (\d\.\d\d)\.", tables)
    assert re.findall(r"\d\.\d\d", readme_part("noise")) == medians
    assert len(medians) == 2


@pytest.mark.parametrize(
    ("part", "platform", "peers"),
    [("train", "cpu", (EAGER, TUTORIAL)), ("train-gpu", "gpu", (EAGER, COMPILED, TUTORIAL))],
)
def test_readme_training_speeds_are_those_of_the_committed_results(part, platform, peers):
    expected = []
    for row in committed("train", platform):
        if "batch" in row:
            cells = row["model"], row["batch"], *(ratio(row["milliseconds"], TRAIN, peer) for peer in peers)
            expected.append(f"| {' | '.join(map(str, cells))} |")
    assert readme_part(part).strip().splitlines()[2:] == expected


def test_readme_shares_in_compiled_programs_are_those_of_the_committed_results():
    medians = (statistics.median(row[SHARES]) for row in committed("train") if SHARES in row)
    assert re.findall(r"\d+\.\d", readme_part("share")) == [f"{100 * median:.1f}" for median in medians]


def test_what_the_docs_include_is_there():
    found = 0
    for page in (ROOT / "docs").rglob("*.md"):
        for path, options in re.findall(r"include\} (\S+)\n((?::.*\n)*)", page.read_text()):
            text = (page.parent / path).read_text()
            wanted = re.findall(r"(?:start-after|start-at|end-before): (.+)", options)
            wanted += [f"class {name}(" for name in re.findall(r"pyobject: (\w+)", options)]
            assert all(text.count(each) == 1 for each in wanted), f"{page}: {path}: {wanted}"
            found += 1
    assert found > 10
