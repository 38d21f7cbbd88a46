"""What users' generated files and plans look like does not change by accident."""

from __future__ import annotations

import json

from tests.codegen import texts


def test_text_and_plan_of_every_conversion_are_as_recorded() -> None:
    recorded = json.loads(texts.RECORDED.read_text(encoding="utf-8"))

    found = {name: texts.hashes(local) for name, local in texts.converted()}

    changed = sorted(name for name in {*recorded, *found} if recorded.get(name) != found.get(name))
    assert not changed, f"if that is meant: python -m {texts.__name__}"
