"""Conditions as JUnit XML, which CI systems show as tests."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from loadtest.comparison.compare import FAILED, Verdict


def junit_xml(verdicts: Sequence[Verdict]) -> str:
    """Return one test case for each condition and stage; a condition that holds is a failure."""
    failures = sum(verdict.outcome == FAILED for verdict in verdicts)
    counts = {"tests": str(len(verdicts)), "failures": str(failures), "errors": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "pareto loadtest", "skipped": "0", **counts})
    for verdict in verdicts:
        name = f"not {verdict.condition.text}"
        case = ElementTree.SubElement(suite, "testcase", {"classname": verdict.load, "name": name})
        if verdict.outcome == FAILED:
            failure = ElementTree.SubElement(case, "failure", {"message": verdict.message, "type": "fail-if"})
            failure.text = f"{verdict.load}: {verdict.condition.text}: {verdict.message}"
        else:
            ElementTree.SubElement(case, "system-out").text = f"{verdict.outcome}: {verdict.message}"
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
