"""An independent second opinion on a generated training step.

:func:`static` reads the text and compares it with the plan; it runs nothing, and works on models without data.
:func:`audit` also runs the step on copies and compares what happened with what is declared. Neither shares code with
the stages that made the text: this package imports the data types, torch and networkx only.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import Tensor

from localize.auditor import measured, structure
from localize.auditor.acceptance import accepted, excused
from localize.auditor.report import ownership, ownership_csv, to_dict, to_markdown
from localize.auditor.text import MAX_BYTES
from localize.errors import InputError
from localize.ir import AuditReport

BEFORE_RUNNING = ("static.readable", "static.plan")
"""Checks that have to hold before anything of a text is executed."""

__all__ = ["MAX_BYTES", "audit", "ownership", "ownership_csv", "static", "to_dict", "to_markdown"]


def static(local: Any, accept: Collection[int] = ()) -> AuditReport:
    """Compare what the text of ``local`` does with what its plan declares, without running it.

    Args:
        local: a :class:`localize.LocalModel`; its parameters may be on the meta device.
        accept: see :func:`audit`.

    Returns:
        The report on the checks that need no execution, as :func:`audit` returns it.

    Raises:
        InputError: a line to accept that is as the plan says.
    """
    found, departures = structure.checks(local)
    return accepted(AuditReport(found, local.plan.deviations), departures, local.source, frozenset(accept))


def audit(
    local: Any, batch: tuple[Any, Tensor] | None = None, *, numeric: bool = True, accept: Collection[int] = ()
) -> AuditReport:
    """Audit the training step of ``local``: its text, and, on a batch, its execution.

    Args:
        local: a :class:`localize.LocalModel`. It is not changed: neither parameters, buffers, gradients and mode, nor
            the state of the random generators.
        batch: images (N, C, H, W) and class ids (N,), as ``local.step`` takes them; without it, only the text is
            audited.
        numeric: take central differences of the losses too, where a backward of the model is not torch's own.
        accept: numbers of lines of the text, counted from 1, whose statements are not in the plan and are wanted. The
            report lists them. What they compute is not compared with the plan; that each loss reaches what it declares,
            and that nothing moves but by the optimizer, is still checked.

    Nothing of the text is executed before all of it is matched with the plan; then its functions are, on copies of the
    model, with the rights of this process, together with the model's own code.

    Returns:
        The report: one check after another, each with its claim and what was found. ``report.ok`` says whether all
        hold.

    Raises:
        InputError: a batch that the training step does not take, or a line to accept that is as the plan says.
    """
    report = static(local, accept)
    if batch is None:
        return report
    inputs, labels = _checked(local, batch)
    unknown = next((check for check in report.checks if not check.ok and check.id in BEFORE_RUNNING), None)
    if unknown is not None:
        return replace(report, checks=(*report.checks, measured.not_run(unknown)))
    plain = local.with_source(local.source, local.filename)  # of a compiled model, the text that it was compiled from
    found = measured.checks(plain, inputs, labels, numeric=numeric)
    return excused(replace(report, checks=(*report.checks, *found)))


def _checked(local: Any, batch: Any) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the tensors and the labels of a batch.

    Raises:
        InputError: it is no pair, or not one that the training step takes.
    """
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise InputError("a batch to audit on is a pair: images and labels.", help="localize.audit(local, (x, y))")
    inputs, labels = local.check(*batch), batch[1]
    classes = local.plan.segments.trunk.num_classes
    ignored = {dict(term.options).get("ignore_index") for loss in local.plan.losses for term in loss.terms}
    ids = set() if labels.is_meta else set(labels.unique().tolist()) - ignored
    if ids and not 0 <= min(ids) <= max(ids) < classes:
        raise InputError(
            f"the labels go from {min(ids)} to {max(ids)}.",
            facts=f"the model tells {classes} classes apart: labels are 0 to {classes - 1}.",
        )
    return inputs, labels
