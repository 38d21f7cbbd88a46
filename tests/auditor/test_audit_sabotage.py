"""The auditor is tested by sabotage: each change of the step has to fail a check."""

from __future__ import annotations

from pathlib import Path

import pytest

from localize.auditor import audit, static
from localize.codegen.emit import emit
from tests.auditor.audit_mutants import mutants
from tests.auditor.audit_nets import PROGRAMS, VARIANTS, batch, make
from tests.auditor.sabotage import edits, layouts, of_the_day, same_step


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


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_edit_that_changes_the_step_passes_the_audit(program: str, tmp_path: Path) -> None:
    local, marker = make(program), tmp_path / "marker"

    passed = []
    for kind, source in of_the_day(list(edits(local.source, str(marker))), 16):
        edited = local.with_source(source)
        if static(edited).ok and not same_step(local, edited):
            passed.append(f"{kind}:\n{source}")

    assert not passed, "\n".join(passed)
    assert not marker.exists(), "an audit has run what it was to look at"


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_edit_of_layout_changes_nothing(program: str) -> None:
    local = make(program)

    for kind, source in layouts(local.source):
        report = static(local.with_source(source))
        assert report.ok, f"{kind}: {[check.evidence for check in report.checks if not check.ok]}"
