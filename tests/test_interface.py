"""What users' programs and generated files call does not change by accident, and is written down."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest

from localize import files, losses, ops
from tests import interface

DOCS = (Path(__file__).parent.parent / "docs" / "interface.md").read_text(encoding="utf-8")
AGAIN = f"if that is meant: python -m {interface.__name__}, and see docs/interface.md about the version"


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads(interface.RECORDED.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", interface.MODULES)
def test_names_and_signatures_of_the_package_are_the_recorded_ones(module: str, recorded: dict) -> None:
    assert interface.package()[module] == recorded["package"][module], AGAIN


def test_names_and_signatures_in_generated_text_are_the_recorded_ones(recorded: dict) -> None:
    assert interface.text() == recorded["text"], AGAIN


def test_the_document_names_every_function_that_generated_text_may_call() -> None:
    """Each with its arguments, as the package has them."""
    for module in (ops, losses):
        for name, signature in interface.package()[module.__name__].items():
            arguments = ", ".join(inspect.signature(getattr(module, name)).parameters)
            assert f"`{name}({arguments})`" in DOCS.replace("*", ""), (module.__name__, name, signature)


def test_the_document_names_every_form_of_function_and_import(recorded: dict) -> None:
    for line in recorded["text"]["imports"]:
        assert line.removeprefix("from localize.ops import ") in DOCS, line
    kinds = {line.partition("(")[0] for line in recorded["text"]["functions"]}
    kinds |= {line.partition(": ")[2].partition(" ")[0] for line in recorded["text"]["values"]}
    for kind in kinds - {"return"}:
        assert f"`{kind}" in DOCS, kind


def test_the_document_says_the_version() -> None:
    assert re.search(rf"version is {files.VERSION}\b", DOCS)
