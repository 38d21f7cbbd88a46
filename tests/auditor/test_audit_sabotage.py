"""The auditor is tested by sabotage: each change of the step has to fail a check.

Some of the changes, other ones every day, are tried each time; ``-m slow`` tries all.
"""

from __future__ import annotations

import random
from datetime import date

import pytest

from localize.auditor import audit, static
from localize.codegen.emit import emit
from localize.runtime.model import LocalModel
from tests.auditor.audit_mutants import mutants
from tests.auditor.audit_nets import VARIANTS, batch, make

SAMPLE = 8
"""Number of changes of each variant that are tried each time."""


def sabotaged(local: LocalModel, *, segments: bool) -> dict[str, str]:
    """Return every text that differs from the model's in one statement, with what was changed."""
    texts: dict[str, str] = {}
    for told, program in mutants(local.program, segments=segments):
        source = emit(program)
        if source != local.source:
            texts.setdefault(source, told)
    return texts


def survivors(local: LocalModel, texts: dict[str, str]) -> str:
    """Return the changes that pass the audit, one a line."""
    passing = []
    for source, told in texts.items():
        mutant = local.with_source(source)
        if static(mutant).ok and audit(mutant, batch()).ok:
            passing.append(told)
    return "\n".join(passing)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_change_of_the_day_passes_the_audit(variant: str) -> None:
    local = make(variant)
    texts = sabotaged(local, segments=False)
    drawn = random.Random(date.today().isoformat()).sample(sorted(texts), SAMPLE)

    assert not survivors(local, {source: texts[source] for source in drawn})


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_change_of_one_statement_of_the_training_passes_the_audit(variant: str) -> None:
    local = make(variant)
    texts = sabotaged(local, segments=False)

    assert len(texts) > 30
    assert not survivors(local, texts)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["backprop", "auglocal", "dcl"])
def test_no_change_of_one_statement_anywhere_passes_the_audit(variant: str) -> None:
    local = make(variant)
    texts = sabotaged(local, segments=True)

    assert len(texts) > 100
    assert not survivors(local, texts)
