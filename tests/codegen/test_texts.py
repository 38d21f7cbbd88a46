"""What users' generated files and plans look like does not change by accident."""

from __future__ import annotations

import json

import pytest

from tests import daily
from tests.codegen import texts

REQUESTS = dict(texts.requests())
RECORDED = json.loads(texts.RECORDED.read_text(encoding="utf-8"))
RENEW = f"if that is meant: python -m {texts.__name__}"


def test_every_conversion_is_recorded() -> None:
    assert REQUESTS.keys() == RECORDED.keys(), RENEW


@pytest.mark.parametrize("name", daily.in_turn(list(REQUESTS), 3))
def test_text_and_plan_are_as_recorded(name: str) -> None:
    assert texts.hashes(REQUESTS[name]()) == RECORDED[name], RENEW
