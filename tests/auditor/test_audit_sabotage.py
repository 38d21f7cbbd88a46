"""The auditor is tested by sabotage: each change of the step has to fail a check."""

from __future__ import annotations

from pathlib import Path

import pytest

from localize.auditor import audit, static
from localize.codegen.emit import emit
from localize.runtime.model import LocalModel
from tests import daily
from tests.auditor.audit_mutants import mutants
from tests.auditor.audit_nets import PROGRAMS, VARIANTS, batch, make
from tests.auditor.sabotage import edits, layouts, of_the_day, same_step

PARTS = 6
"""Parts of the changes of a variant; each holds every sixth."""


def sabotaged(local: LocalModel, *, segments: bool) -> list[tuple[str, str]]:
    """Return every text that differs from the model's in one statement, after what was changed, each text once."""
    texts: dict[str, str] = {}
    for told, program in mutants(local.program, segments=segments):
        source = emit(program)
        if source != local.source:
            texts.setdefault(source, told)
    return [(told, source) for source, told in texts.items()]


def survivors(local: LocalModel, texts: list[tuple[str, str]]) -> str:
    """Return the changes that pass the audit, one a line."""
    passing = []
    for told, source in texts:
        mutant = local.with_source(source)
        if static(mutant).ok and audit(mutant, batch()).ok:
            passing.append(told)
    return "\n".join(passing)


@pytest.mark.parametrize("part", daily.parts(PARTS))
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_change_of_one_statement_of_the_training_passes_the_audit(variant: str, part: int) -> None:
    local = make(variant)
    texts = sabotaged(local, segments=False)

    assert len(texts) > 30
    assert not survivors(local, texts[part::PARTS])


@pytest.mark.zoo
@pytest.mark.parametrize("variant", ["backprop", "auglocal", "dcl"])
def test_no_change_of_one_statement_anywhere_passes_the_audit(variant: str) -> None:
    local = make(variant)
    texts = sabotaged(local, segments=True)

    assert len(texts) > 100
    assert not survivors(local, texts)


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_edit_that_changes_the_step_passes_the_audit(program: str, tmp_path: Path) -> None:
    local, marker = make(program), tmp_path / "marker"

    passed = []
    for edit in of_the_day(list(edits(local.source, str(marker))), 16):
        edited = local.with_source(edit.text())
        if static(edited).ok and not same_step(local, edited):
            passed.append(f"{edit.kind}:\n{edited.source}")

    assert not passed, "\n".join(passed)
    assert not marker.exists(), "an audit has run what it was to look at"


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_edit_of_layout_changes_nothing(program: str) -> None:
    local = make(program)

    for kind, source in layouts(local.source):
        report = static(local.with_source(source))
        assert report.ok, f"{kind}: {[check.evidence for check in report.checks if not check.ok]}"
