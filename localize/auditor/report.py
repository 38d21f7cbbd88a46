"""Write an audit down: as JSON, as Markdown, and as a table of which parameter is trained by which losses."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from localize.auditor.structure import Evidence
from localize.ir import AuditReport

EXECUTED = (
    "An audit runs nothing of the text before each of its statements is matched with the plan; then it runs the step "
    "on copies of the model, with the rights of the process that audits, together with the code of model and heads."
)
"""What an audit executes, and when."""
COLUMNS = ("parameter", "block", "elements", "trained_by", "declared_by", "status")


def to_dict(report: AuditReport) -> dict[str, Any]:
    """Return the report as JSON-serialisable data.

    Args:
        report: from :func:`localize.audit`.
    """
    checks = [{"id": c.id, "ok": c.ok, "claim": c.claim, "evidence": c.evidence} for c in report.checks]
    accepted = [{"line": line, "text": text} for line, text in report.accepted]
    told = {"accepted": accepted} if accepted else {}
    return {"ok": report.ok, "checks": checks, "deviations": list(report.deviations), **told}


def to_markdown(report: AuditReport, title: str = "Audit of the training step") -> str:
    """Return the report as a Markdown page: a verdict, one row per check, and the evidence of what failed.

    Args:
        report: from :func:`localize.audit`.
        title: heading of the page.
    """
    failed = [check for check in report.checks if not check.ok]
    lines = [f"# {title}", "", report.verdict, "", EXECUTED, ""]
    for check in failed:
        lines += [f"## {check.id} fails", "", f"Claim: {check.claim}.", "", "```text", check.evidence, "```", ""]
    lines += ["| check | holds | claim | evidence |", "|---|---|---|---|"]
    for check in report.checks:
        first = check.evidence.splitlines()[0] if check.ok and check.evidence else "see above"
        cells = (check.id, "yes" if check.ok else "**no**", check.claim, first)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    if report.accepted:
        lines += [
            "",
            "## Accepted statements",
            "",
            "Not in the plan, and accepted by whoever audits.",
            "",
        ]
        lines += ["```text", *(f"line {line}: {text}" for line, text in report.accepted), "```"]
    if report.deviations:
        lines += ["", "## Where the method deviates from its paper", "", *(f"- {line}" for line in report.deviations)]
    return "\n".join(lines) + "\n"


def ownership(local: Any) -> Iterator[tuple[str, str, int, str, str, str]]:
    """Yield one row for every parameter: :data:`COLUMNS`.

    ``trained_by`` is what the text does, ``declared_by`` what the plan says; both are losses separated by ``;``.
    ``status`` is ``own`` (one loss), ``overlap`` (several, all declared), ``frozen``, ``unused`` (no loss, as
    declared), ``leak`` (trained by an undeclared loss) or ``dead`` (declared, and not trained).

    Args:
        local: a :class:`localize.LocalModel`.
    """
    evidence = Evidence(local)
    plan = evidence.plan
    blocks = {name: block.name for block in plan.blocks for name in block.parameters}
    declared = {loss.name: plan.reach(loss) for loss in plan.losses}
    for name, parameter in local.named_parameters():
        does = [loss.name for loss in plan.losses if name in evidence.reach.get(loss.name, ())]
        says = [loss.name for loss in plan.losses if name in declared[loss.name]]
        status = _status(does, says, parameter.requires_grad)
        yield name, blocks.get(name, ""), parameter.numel(), ";".join(does), ";".join(says), status


def _status(does: list[str], says: list[str], trainable: bool) -> str:
    if set(does) - set(says):
        return "leak"
    if set(says) - set(does):
        return "dead"
    if not does:
        return "unused" if trainable else "frozen"
    return "overlap" if len(does) > 1 else "own"


def ownership_csv(local: Any) -> str:
    """Return :func:`ownership` as CSV, with a header.

    Args:
        local: a :class:`localize.LocalModel`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(ownership(local))
    return text.getvalue()
