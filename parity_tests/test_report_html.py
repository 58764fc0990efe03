"""The report's page in headless Chromium, and what there is to read in it; the report as JUnit XML."""

import json
import re
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn import functional as F  # noqa: N812

from _jaxloss_pytestplugin import Checked
from jaxloss import parity
from jaxloss.parity._background import Errors
from jaxloss.parity._detail import Detail, bin_end
from jaxloss.parity._findings import Finding
from jaxloss.parity._html import save_index
from jaxloss.parity._layout import Layout, channels_last, permuted, same
from parity_tests.chromium import chromium
from parity_tests.zoo import CASES, run

HOSTILE = (
    "<script>ran = 1</script>",
    '" onmouseover="ran = 1" x=\'',
    "</script><script>ran = 1</script>",
    "<img src=x onerror='ran = 1'>",
    "step 1",  # as the report calls the optimizer's
)


class TorchLine(nn.Module):
    """Linear layers of any names, one after the other."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = F.gelu(layer(x))
        return x


class FlaxLine(nnx.Module):
    """`TorchLine`, ported."""

    def __init__(self, names: list[str], rngs: nnx.Rngs) -> None:
        self.names, self.approximate = tuple(names), False
        for name in names:
            setattr(self, name, nnx.Linear(4, 4, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        for name in self.names:
            x = jax.nn.gelu(getattr(self, name)(x), approximate=self.approximate)
        return x


def line(names: list[str], *, approximate: bool = False, swapped: str = "", **options: Any) -> parity.Report:
    torch.manual_seed(0)
    original = type(HOSTILE[0], (TorchLine,), {})(names)
    port = parity.load_torch(FlaxLine(names, nnx.Rngs(0)), original.state_dict())
    port.approximate = approximate
    if swapped:
        getattr(port, swapped).kernel.set_value(getattr(port, swapped).kernel[...].T)
    return parity.check(original, port, torch.randn(5, 4), losses=None, **options)


@cache
def report(name: str) -> parity.Report:
    """Of a right port, of broken ones, of one with hostile names, and of one with a hundred layers."""
    match name:
        case "right":
            return run(CASES["flat"], steps=3)
        case "broken":
            return line(["up", "down"], approximate=True, steps=2, dtypes=["float64"])
        case "not finite":
            once = report("broken")
            wrong = {"up": Errors(np.nan, 1e-12), "down": Errors(np.inf, 1e-12)}
            stages = {
                p: replace(s, forced={"float64": wrong.get(p) or s.forced["float64"]})
                for p, s in once.background.stages.items()
            }
            return replace(once, background=replace(once.background, stages=stages))
        case "hostile":
            return line([*HOSTILE], swapped=HOSTILE[0], steps=0, dtypes=["float64"])
    return many_times(report("broken"), 50)


def many_times(once: parity.Report, times: int) -> parity.Report:
    """A report of blocks that all came out like this one, with two layers each."""

    def renamed(item: Any, i: int) -> Any:
        return replace(item, place=item.place.replace("up", f"blocks.{i}.up").replace("down", f"blocks.{i}.down"))

    stages = [renamed(stage, i) for i in range(times) for stage in once.background.stages.values()]
    findings = [renamed(finding, i) for i in range(times) for finding in once.findings]
    background = replace(once.background, stages={stage.place: stage for stage in stages})
    return replace(once, findings=findings, background=background)


def save_index_of_hostile_tests(path: Path) -> None:
    good, bad = (
        Checked(name, name == "Net", f"differs:\n  {name}", 3, 0.5, name, 1, 1, "a.html")
        for name in ("Net", HOSTILE[0])
    )
    save_index([("tests.py::test_it[a]", good), (f"tests.py::test_it[{HOSTILE[2]}]", bad)], path)


def write(name: str, path: Path) -> None:
    if name == "index":
        save_index_of_hostile_tests(path)
    else:
        report(name).to_html(path)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens a report. At the end: nothing was written to the console, and nothing but the file was asked for."""
    opened, said, asked = [], [], []

    def open_page(name: str, **options: Any) -> Any:
        path = tmp_path / f"{name}.html"
        write(name, path)
        page = browser.new_page(**options)
        page.set_default_timeout(10_000)
        opened.append(page)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        asked.remove(path.as_uri())
        return page

    yield open_page
    for page in opened:
        page.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == []


NAMES = "rows => rows.filter(row => !row.hidden).map(row => row.dataset.name)"


def shown(page: Any) -> list[str]:
    """The names in the rows that are to be seen, from top to bottom."""
    return page.eval_on_selector_all(".places > tbody", NAMES)


def test_first_screen_gives_the_verdict_and_the_fix(visit):
    page = visit("right", viewport={"width": 1280, "height": 800})
    assert page.inner_text("h1") == "Agrees with PyTorch"
    assert "planted faults were" in page.inner_text(".lead")
    page = visit("broken", viewport={"width": 1280, "height": 800})
    assert page.inner_text("h1") == "Differs from PyTorch"
    first = page.inner_text(".first")
    assert "between up and down" in first
    assert "The port applies gelu with approximate=True where PyTorch applies gelu." in first
    assert "pass approximate=False to jax.nn.gelu" in first
    box = page.locator(".first").bounding_box()
    assert box["y"] + box["height"] < 800
    page.click(".first a")
    assert page.locator("#first .detail").first.is_visible()


@pytest.mark.parametrize("name", ["right", "broken", "hundred"])
def test_sorting_and_filtering(visit, name):
    page = visit(name)
    every = shown(page)
    page.click(".sort[data-key=free]")
    errors = page.locator(".free .measure:visible").evaluate_all("bars => bars.map(bar => Number(bar.dataset.ratio))")
    assert len(errors) == page.locator(".layer, .edge").count()
    assert errors == sorted(errors, reverse=True)
    assert page.locator(".places th[aria-sort=descending]").inner_text().startswith("In the network")
    assert shown(page) != every
    assert sorted(shown(page)) == sorted(every)
    page.click(".sort[data-key=order]")
    assert shown(page) == every
    page.fill("#find", every[1].split()[0].upper())
    assert 0 < len(shown(page)) < len(every)
    page.fill("#find", "")
    page.check("#failed")
    assert len(shown(page)) == page.locator(".places > tbody.failed").count() < len(every)
    assert page.locator("#nothing").is_visible() == (name == "right")
    page.uncheck("#failed")
    page.select_option("#least", "1000")
    assert len(shown(page)) < len(every)


def test_what_is_not_finite_is_the_largest_error(visit):
    page = visit("not finite", viewport={"width": 360, "height": 740})
    assert page.locator(".forced .value").all_inner_texts()[1] == "not finite"
    heights = page.locator(".forced .value:visible").evaluate_all("values => values.map(value => value.offsetHeight)")
    assert max(heights) < 1.5 * min(heights), "in one line"
    page.set_viewport_size({"width": 1280, "height": 800})
    page.click(".sort[data-key=forced]")
    assert shown(page)[:2] == ["up up", "down down"]
    page.select_option("#least", "1000")
    assert {"up up", "down down"} <= set(shown(page))


def test_dtypes_can_be_switched(visit):
    page = visit("right")
    bars = page.locator(".forced .measure:visible")
    dtypes = bars.evaluate_all("bars => [...new Set(bars.map(bar => bar.dataset.dtype))]")
    assert dtypes == ["float32"]
    page.click("label[for=show-float64]")
    assert bars.evaluate_all("bars => [...new Set(bars.map(bar => bar.dataset.dtype))]") == ["float64"]


OUTLINE = """() => {
  const focused = document.activeElement;
  const seen = getComputedStyle(focused.type === "radio" ? focused.nextElementSibling : focused);
  const visible = seen.outlineStyle !== "none" && parseFloat(seen.outlineWidth) >= 2;
  return [focused.tagName + (focused.dataset.key ?? ""), visible];
}"""


def test_keyboard_reaches_everything_and_shows_where_it_is(visit):
    page = visit("broken")
    stops = []
    for _ in range(24):
        page.keyboard.press("Tab")
        stops.append(page.evaluate(OUTLINE))
    assert all(visible for _, visible in stops), stops
    tags = [tag for tag, _ in stops]
    assert {"A", "INPUT", "SELECT", "BUTTONorder", "BUTTONfree", "SUMMARY"} <= set(tags), tags
    panel = page.query_selector(".places details:not([open])")
    panel.query_selector("summary").focus()
    assert not panel.query_selector(".tensors").is_visible()
    page.keyboard.press("Enter")
    assert panel.query_selector(".tensors").is_visible()
    sort = page.locator(".sort[data-key=free]")
    sort.focus()
    page.keyboard.press("Enter")
    assert page.locator(".places th[aria-sort]").inner_text().startswith("In the network")


@pytest.mark.parametrize("name", ["right", "broken", "hostile", "hundred"])
def test_phone_width_needs_no_sideways_scrolling(visit, name):
    page = visit(name, viewport={"width": 360, "height": 740})
    page.eval_on_selector_all("details", "all => all.slice(0, 200).forEach(each => { each.open = true; })")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 360
    bar = page.locator(".forced .bar:visible").first.bounding_box()
    assert bar["x"] >= 0
    assert bar["x"] + bar["width"] < 360


def test_hostile_names_are_text(visit, tmp_path):
    page = visit("hostile")
    names = page.locator(".layer th .name").all_inner_texts()
    assert names == [*HOSTILE]
    assert page.locator(".eyebrow code").inner_text() == HOSTILE[0]
    assert page.evaluate("typeof ran") == "undefined"
    assert page.locator("main script, main img, [onmouseover]").count() == 0
    report("hostile").to_junit(tmp_path / "report.xml")
    cases = ET.parse(tmp_path / "report.xml").iter("testcase")
    assert {*HOSTILE} <= {case.get("name") for case in cases}


def test_index_of_a_test_run_puts_what_differs_first(visit):
    page = visit("index", viewport={"width": 360, "height": 640})
    assert page.locator("h1").inner_text() == "1 of 2 differ from PyTorch"
    first, second = page.locator(".tests li").all()
    assert first.inner_text().count(HOSTILE[0]) == 3
    assert HOSTILE[2] in first.inner_text()
    assert first.get_by_role("link").get_attribute("href") == "a.html"
    assert "3 tensors, at most 0.5\N{MULTIPLICATION SIGN} of what is allowed (Net)" in second.inner_text()
    assert page.evaluate("typeof ran") == "undefined"
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 360


@pytest.mark.parametrize("name", ["broken", "index"])
def test_policy_stops_what_is_not_the_pages_own(browser, tmp_path, name):
    path = tmp_path / "page.html"
    write(name, path)
    path.write_text(
        path.read_text().replace("</main>", "<script>ran = 1</script><style>h1 { color: #123456 }</style></main>")
    )
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.evaluate("typeof ran") == "undefined"
    assert page.locator("h1").evaluate("h1 => getComputedStyle(h1).color") != "rgb(18, 52, 86)"
    page.close()


def test_page_reads_without_scripts(visit):
    page = visit("broken", java_script_enabled=False)
    assert not page.locator("#find").is_visible()
    assert page.locator("#first .elements tbody tr").first.is_visible()
    page.locator(".layer summary").first.click()
    assert page.locator(".layer .tensors").first.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(visit, scheme):
    page = visit("broken", color_scheme=scheme)
    colours = page.evaluate(
        """() => ["body", ".faint", "h1", ".why", ".kind", ".failed summary b", ".tag"].map(selector => {
          const element = document.querySelector(selector);
          let behind = element;
          while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
          return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor];
        })"""
    )
    contrasts = [contrast(*pair) for pair in colours]
    assert min(contrasts) >= 4.5, contrasts
    assert (luminance(colours[0][1]) < 0.2) == (scheme == "dark")


def luminance(colour: str) -> float:
    """Of rgb(…), as WCAG has it."""
    channels = np.array([float(x) / 255 for x in re.findall(r"[\d.]+", colour)[:3]])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a: str, b: str) -> float:
    low, high = sorted(map(luminance, (a, b)))
    return (high + 0.05) / (low + 0.05)


def test_report_without_a_verdict_is_a_page_too(tmp_path):
    parity.Report([]).to_html(tmp_path / "nothing.html")
    parity.Report([Finding("fc", "bias", "", np.inf, 0.0, problem="is \ud800 odd")]).to_html(tmp_path / "one.html")
    assert "Nothing can be said" in (tmp_path / "nothing.html").read_text(encoding="utf-8")
    assert "is \\ud800 odd" in (tmp_path / "one.html").read_text(encoding="utf-8")


def test_first_difference_in_a_step_is_linked(tmp_path):
    right = report("right")
    wrong = [replace(f, error=1.0) if f.place == "step 2" else f for f in right.findings]
    replace(right, findings=wrong).to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('id="first"') == 1
    assert page.index('id="first"') > page.index('id="steps"')


def test_report_keeps_each_layers_errors_alone_and_in_the_network():
    stages = report("right").background.stages
    conv = stages["conv"]
    assert (conv.flax_name, conv.torch_kind, conv.flax_kind) == ("conv", "Conv2d", "Conv")
    assert list(stages) == [
        "between the input and conv",
        "conv",
        "between conv and fc",
        "fc",
        "between fc and the output",
    ]
    for stage in stages.values():
        assert stage.forced.keys() == stage.free.keys() == {"float64", "float32"}
        for errors in (stage.forced["float32"], stage.free["float32"]):
            assert errors.ours <= 4 * errors.reference + 2e-7
    assert 1e-9 < conv.free["float32"].ours < 1e-6
    assert 1e-9 < conv.free["float32"].reference < 1e-6
    stages = report("broken").background.stages
    alone, together = (
        {p: getattr(s, kind)["float64"].ours > 1e-12 for p, s in stages.items()} for kind in ("forced", "free")
    )
    wrong = ["between up and down", "between down and the output"]
    assert [place for place, off in alone.items() if off] == wrong
    assert [place for place, off in together.items() if off] == [wrong[0], "down", wrong[1]]


def test_report_keeps_the_trajectory_and_its_noise():
    steps = report("right").background.steps
    assert {dtype: len(each) for dtype, each in steps.items()} == {"float64": 3, "float32": 3}
    for step in steps["float64"]:
        assert 0 <= step.ours < step.allowed
        assert 1e-18 < step.noise < 1e-12
    assert all(step.allowed is None and 1e-9 < step.noise < 1e-6 for step in steps["float32"])
    assert report("right").noise["parameters after 3 steps (float32)"] == (
        steps["float32"][-1].ours,
        steps["float32"][-1].noise,
    )
    last = report("broken").background.steps["float64"][-1]
    assert last.ours > last.allowed


def test_details_are_those_of_the_arrays():
    broken = report("broken")
    first = broken.first_divergence
    assert first.detail is not None
    assert sum(first.detail.ours) == 20
    worst = first.detail.worst
    assert len(worst) == 10
    assert [e.units for e in worst] == sorted((e.units for e in worst), reverse=True)
    for element in worst:
        assert element.units * first.detail.unit == abs(element.ours - element.theirs)
    weights = [f for f in report("right").findings if f.place == "conv" and f.quantity == "weight"]
    assert [(f.detail.ours, f.detail.worst) for f in weights] == [((4 * 9,), ())]
    told = {finding.place for finding in broken.findings if finding.detail and finding.place.startswith("step ")}
    assert told == {"step 1"}


LAYOUTS = {
    "convolution": permuted((3, 2, 4, 5), (3, 2, 0, 1)),
    "flipped": permuted((3, 2, 4, 5), (2, 3, 0, 1), flip=(0, 1)),
    "feature map": Layout((12, 5), (2, 3, 2, 5), (3, 2, 0, 1), (5, 12)),
    "image": channels_last((2, 3, 4, 5)),
    "scalar": same(()),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_torch_index_is_where_the_element_goes(layout):
    array = np.arange(np.prod(layout.shape, dtype=int)).reshape(layout.shape)
    moved = layout.to_torch(array)
    for index in np.ndindex(layout.shape):
        assert moved[layout.torch_index(index)] == array[index]


def test_detail_counts_errors_in_units_of_rounding():
    theirs, eps = np.ones(12), np.finfo(np.float64).eps
    ours = theirs + eps * np.array([0, 0, 0, 1, 1, 2, 3, 4, 5, -8, 2**20, 2**20])
    detail = Detail.of(ours, theirs, same((12,)))
    counts = {bin_end(i): count for i, count in enumerate(detail.ours) if count}
    assert counts == {0: 3, 1: 2, 2: 1, 4: 2, 8: 2, 2**20: 2}
    assert (detail.unit, detail.theirs) == (eps, ())
    assert [e.index for e in detail.worst][:4] == [(10,), (11,), (9,), (8,)]
    assert len(detail.worst) == 9
    half = Detail.of(np.float32([1.5]), np.float32([1 + 2**-22]), same((1,)), np.array([1.0]))
    assert (half.unit, bin_end(len(half.theirs) - 1), half.worst[0].exact) == (2.0**-23, 2.0, 1.0)


def test_detail_puts_what_is_not_finite_first():
    theirs = np.array([1.0, np.nan, np.inf, 2.0])
    detail = Detail.of(np.array([np.nan, np.nan, np.inf, 2.5]), theirs, same((4,)))
    assert [e.index for e in detail.worst] == [(0,), (3,)]
    assert (detail.worst[0].units, detail.ours[0], detail.ours[-1]) == (np.inf, 2, 1)
    assert Detail.of(np.ones(3), np.ones(4), same((4,))) is None
    assert Detail.of(np.full(2, 1e300), np.full(2, -1e300), same((2,))).ours[-1] == 2


def test_detail_of_a_large_permuted_array():
    layout = permuted((700, 900), (1, 0))
    theirs = np.random.default_rng(0).normal(size=(900, 700)).T
    ours = theirs.copy()
    ours[650, 123] += 1e-9
    ours[3, 5] -= 1e-3
    detail = Detail.of(ours, theirs, layout)
    assert sum(detail.ours) == ours.size
    assert [(e.index, e.torch_index) for e in detail.worst] == [((3, 5), (5, 3)), ((650, 123), (123, 650))]


def test_detail_copies_no_large_array_whose_first_axis_is_short():
    array = np.ones((1, 4096, 1024))
    tracemalloc.start()
    assert Detail.of(array, array, same(array.shape)).ours == (array.size,)
    assert tracemalloc.get_traced_memory()[1] < array.nbytes
    tracemalloc.stop()


def test_json_holds_what_the_page_shows(tmp_path):
    written = report("broken").to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == written
    assert len(written["first_divergence"]["detail"]["worst"]) == 10
    assert written["steps"]["float64"][0].keys() == {"ours", "noise", "allowed"}
    assert written["stages"]["up"]["free"]["float64"].keys() == {"ours", "reference"}
    assert {"jax", "torch", "python", "platform", "device"} <= written["environment"].keys()
    assert {"ours": "up.kernel", "theirs": "up.weight", "shape": [4, 4], "torch_shape": [4, 4]} in written["weights"]


def test_junit_has_a_case_per_place_and_says_why(tmp_path):
    for name in ("right", "broken"):
        report(name).to_junit(tmp_path / "report.xml")
        root = ET.parse(tmp_path / "report.xml").getroot()
        (suite,) = root
        cases = {case.get("name"): case for case in suite.iter("testcase")}
        assert [root.tag, suite.tag] == ["testsuites", "testsuite"]
        assert cases.keys() == report(name).places().keys() | {"planted faults"}
        failed = {place for place, case in cases.items() if case.find("failure") is not None}
        assert failed == {finding.place for finding in report(name).failures()}
        for element in (root, suite):
            assert int(element.get("tests")) == len(cases)
            assert (int(element.get("failures")), element.get("errors")) == (len(failed), "0")
            assert float(element.get("time")) > 0
        assert all(case.get("classname") and float(case.get("time")) >= 0 for case in cases.values())
        properties = {each.get("name"): each.get("value") for each in suite.find("properties")}
        assert properties["jax"] == jax.__version__
    failure = cases["between up and down"].find("failure")
    assert failure.get("type") == "semantic"
    assert "The port applies gelu with approximate=True" in failure.get("message")
    assert "Fix: pass approximate=False" in failure.text


def test_junit_replaces_what_xml_cannot_hold(tmp_path):
    place = "a\x00b\x1b<c>&\"'\ud800\uffff\U0001f600\té"
    parity.Report([Finding(place, "bias", "", np.inf, 0.0, problem=place)]).to_junit(tmp_path / "report.xml")
    root = ET.parse(tmp_path / "report.xml").getroot()
    first, controls = root.iter("testcase")
    assert first.get("name") == "a\ufffdb\ufffd<c>&\"'\ufffd\ufffd\U0001f600\té"
    assert first.get("name") in first.find("failure").get("message")
    assert "0 of 0" in controls.find("failure").get("message")
    assert root.get("failures") == "2"
