"""The auditor is tested by sabotage: each change of the step has to fail a check."""

from __future__ import annotations

import pytest

from localize.auditor import audit, static
from localize.codegen.emit import emit
from tests.auditor.audit_mutants import mutants
from tests.auditor.audit_nets import VARIANTS, batch, make


def survivors_of(variant: str, *, segments: bool) -> tuple[list[str], int]:
    """Audit every mutant of a variant; return those that pass, and how many there were."""
    local = make(variant)
    survivors, seen, texts = [], 0, set()

    for told, program in mutants(local.program, segments=segments):
        source = emit(program)
        if source == local.source or source in texts:
            continue
        texts.add(source)
        seen += 1
        mutant = local.with_source(source)
        report = static(mutant)
        if report.ok:
            report = audit(mutant, batch())
        if report.ok:
            survivors.append(told)

    return survivors, seen


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_change_of_one_statement_of_the_training_passes_the_audit(variant: str) -> None:
    survivors, seen = survivors_of(variant, segments=False)

    assert seen > 30
    assert not survivors, f"{len(survivors)} of {seen} mutants pass the audit:\n" + "\n".join(survivors)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["backprop", "auglocal", "dcl"])
def test_no_change_of_one_statement_anywhere_passes_the_audit(variant: str) -> None:
    survivors, seen = survivors_of(variant, segments=True)

    assert seen > 100
    assert not survivors, f"{len(survivors)} of {seen} mutants pass the audit:\n" + "\n".join(survivors)
