"""Statements that are not in the plan, and that whoever audits accepts: exactly these, and they stand in the report."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from localize.auditor.matching import Departure
from localize.errors import InputError
from localize.ir import AuditReport, Check

EXCUSED = frozenset({
    "static.used", "static.operations", "static.terms", "measured.forward-eval", "measured.forward-train",
    "measured.gradients", "measured.values", "measured.left", "measured.again", "measured.crossings",
    "measured.batchnorm", "measured.plain-training", "measured.micro-batches",
})  # fmt: skip
"""Checks that compare what is computed with the plan: with accepted statements they need not hold. The others must."""


def accepted(report: AuditReport, departures: Sequence[Departure], source: str, lines: Collection[int]) -> AuditReport:
    """Return the report in which the statements at these lines are accepted.

    Raises:
        InputError: a line that holds nothing which is not in the plan.
    """
    if not lines:
        return report
    unknown = {departure.line for departure in departures}
    for line in sorted(lines):
        if line not in unknown:
            told = ", ".join(str(one) for one in sorted(unknown) if one) or "none"
            raise InputError(
                f"line {line} cannot be accepted: it is as the plan says.",
                facts=f"lines that are not in the plan: {told}.",
            )
    text = source.splitlines()
    statements = tuple((line, text[line - 1].strip()) for line in sorted(lines))
    left = [departure for departure in departures if departure.line not in lines]
    checks = []
    for check in report.checks:
        if check.id == "static.plan" and not left:
            told = f"all but {len(statements)} accepted statements are matched one to one"
            checks.append(Check(check.id, True, check.claim, told))
        else:
            checks.append(check)
    return excused(replace(report, checks=tuple(checks), accepted=statements))


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
