"""An independent second opinion on a generated training step.

:func:`static` reads the text and compares it with the plan; it runs nothing, and works on models without data.
:func:`audit` also runs the step on copies and compares what happened with what is declared. Neither shares code with
the stages that made the text: this package imports the data types, torch and networkx only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from localize.auditor import measured, structure
from localize.auditor.report import ownership, ownership_csv, to_dict, to_markdown
from localize.auditor.text import MAX_BYTES
from localize.errors import InputError
from localize.ir import AuditReport

BEFORE_RUNNING = ("static.readable", "static.plan")
"""Checks that have to hold before anything of a text is executed."""

__all__ = ["MAX_BYTES", "audit", "ownership", "ownership_csv", "static", "to_dict", "to_markdown"]


def static(local: Any) -> AuditReport:
    """Compare what the text of ``local`` does with what its plan declares, without running it.

    Args:
        local: a :class:`localize.LocalModel`; its parameters may be on the meta device.
    """
    return AuditReport(structure.checks(local), local.plan.deviations)


def audit(local: Any, batch: tuple[Any, Tensor] | None = None, *, numeric: bool = True) -> AuditReport:
    """Audit the training step of ``local``: its text, and, on a batch, its execution.

    Args:
        local: a :class:`localize.LocalModel`. It is not changed: neither parameters, buffers, gradients and mode, nor
            the state of the random generators.
        batch: images (N, C, H, W) and class ids (N,), as ``local.step`` takes them; without it, only the text is
            audited.
        numeric: compare gradients with central differences of the losses as well, which takes about half of the time.

    Nothing of the text is executed before all of it is matched with the plan; then its functions are, on copies of the
    model, with the rights of this process, together with the model's own code.

    Raises:
        InputError: a batch that the training step does not take.
    """
    report = static(local)
    if batch is None:
        return report
    inputs, labels = _checked(local, batch)
    unknown = next((check for check in report.checks if not check.ok and check.id in BEFORE_RUNNING), None)
    if unknown is not None:
        return replace(report, checks=(*report.checks, measured.not_run(unknown)))
    plain = local.with_source(local.source, local.filename)  # of a compiled model, the text that it was compiled from
    return replace(report, checks=(*report.checks, *measured.checks(plain, inputs, labels, numeric=numeric)))


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
