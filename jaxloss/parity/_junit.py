"""A report as JUnit XML: a test case per place."""

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

from jaxloss.parity._findings import Finding
from jaxloss.parity._report import Report

# What XML 1.0 has no way to write.
_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def save_junit(report: Report, path: Path) -> None:
    """Writes the file. Of what XML cannot hold, U+FFFD is written."""
    cases = {place: [finding for finding in findings if not finding.ok] for place, findings in report.places().items()}
    caught, planted = report.controls
    failures = sum(map(bool, cases.values())) + (not caught == planted > 0)
    seconds = f"{report.background.seconds:.3f}"
    name = _legal(f"parity of {report.background.name}".removesuffix(" of "))
    counts = {"tests": str(len(cases) + 1), "failures": str(failures), "errors": "0", "time": seconds}
    root = ET.Element("testsuites", {"name": "jaxloss.parity", **counts})
    suite = ET.SubElement(root, "testsuite", {"name": name, "skipped": "0", **counts})
    properties = ET.SubElement(suite, "properties")
    for key, value in report.background.environment.items():
        ET.SubElement(properties, "property", name=_legal(key), value=_legal(value))
    for place, failed in cases.items():
        case = ET.SubElement(suite, "testcase", classname=name, name=_legal(place), time="0")
        if failed:
            _add_failure(case, failed)
    case = ET.SubElement(suite, "testcase", classname=name, name="planted faults", time="0")
    if not caught == planted > 0:
        ET.SubElement(case, "failure", type="controls", message=f"{caught} of {planted} planted faults were caught")
    ET.SubElement(suite, "system-out").text = _legal(str(report))
    ET.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _add_failure(case: ET.Element, failed: Sequence[Finding]) -> None:
    first = failed[0]
    message = " ".join(str(first).split("\n  ")).removeprefix(f"{first.place}: ")
    failure = ET.SubElement(case, "failure", type=first.kind or "difference", message=_legal(message))
    failure.text = _legal("\n".join(map(str, failed)))


def _legal(text: str) -> str:
    return _FORBIDDEN.sub("\ufffd", text)
