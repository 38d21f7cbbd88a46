"""Statements that are not in the plan, and that whoever audits accepts: exactly these, and they stand in the report."""

from __future__ import annotations

import ast
from collections.abc import Collection, Sequence
from dataclasses import replace

from localize.auditor.matching import Departure
from localize.auditor.reading import Problem
from localize.auditor.text import parse
from localize.errors import InputError
from localize.ir import AuditReport, Check

EXCUSED = frozenset({
    "static.used", "static.operations", "static.terms", "measured.forward-eval", "measured.forward-train",
    "measured.gradients", "measured.values", "measured.left", "measured.again", "measured.crossings",
    "measured.batchnorm", "measured.graph", "measured.plain-training", "measured.micro-batches",
    "measured.exact-parts",
})  # fmt: skip
"""Checks that compare what is computed with the plan: with accepted statements they need not hold. The others must."""


def accepted(report: AuditReport, departures: Sequence[Departure], source: str, lines: Collection[int]) -> AuditReport:
    """Return the report in which the statements at these lines are accepted.

    Raises:
        InputError: a line that holds nothing which is not in the plan.
    """
    if not lines:
        return report
    unknown = {departure.line for departure in departures if departure.line}
    for line in sorted(lines):
        if line not in unknown:
            told = ", ".join(map(str, sorted(unknown))) or "none"
            raise InputError(
                f"line {line} cannot be accepted: it is as the plan says.",
                facts=f"lines that are not in the plan: {told}.",
            )
    statements = tuple((line, _statement(source, line)) for line in sorted(lines))
    left = [departure for departure in departures if departure.line not in lines]
    checks = []
    for check in report.checks:
        if check.id == "static.plan" and not left:
            told = f"all but {len(statements)} accepted statements are matched one to one"
            checks.append(Check(check.id, True, check.claim, told))
        else:
            checks.append(check)
    return excused(replace(report, checks=tuple(checks), accepted=statements))


def _statement(source: str, line: int) -> str:
    """Return the whole statement that a line belongs to, on one line; of a function, all before its body."""
    first = last = line
    tree = parse(source, len(source))
    for node in () if isinstance(tree, Problem) else ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            start, end = min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.body[0].lineno - 1
        elif isinstance(node, ast.stmt):
            start, end = node.lineno, node.end_lineno or node.lineno
        else:
            continue
        if start <= line <= end and end - start >= last - first:
            first, last = start, end
    return " ".join(text.strip() for text in source.splitlines()[first - 1 : last])


def excused(report: AuditReport) -> AuditReport:
    """Return the report in which accepted statements excuse that other values are computed than the plan says."""
    if not report.accepted:
        return report
    checks = [
        check
        if check.ok or check.id not in EXCUSED
        else Check(check.id, True, check.claim, f"not as in the plan, with accepted statements: {check.evidence}")
        for check in report.checks
    ]
    return replace(report, checks=tuple(checks))
