"""What is built to be installed: complete, typed, licensed, and the same recipes as in the checkout."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder

import localize
from localize import recipes

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel and unpack it, as an installer does."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("torch_localize-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_file_of_the_package_and_every_recipe(installed: Path) -> None:
    sources = [path for path in (ROOT / "localize").rglob("*") if path.suffix in (".py", ".typed")]
    assert sources
    assert all((installed / path.relative_to(ROOT)).read_bytes() == path.read_bytes() for path in sources)
    packaged = {path.name: path.read_bytes() for path in (installed / "localize" / "_recipes").rglob("*.yaml")}
    assert packaged == {path.name: path.read_bytes() for path in (ROOT / "recipes").rglob("*.yaml")}
    assert (installed / "localize" / "py.typed").is_file()


def test_the_wheel_holds_nothing_else(installed: Path) -> None:
    info = f"torch_localize-{localize.__version__}.dist-info"
    assert {path.name for path in installed.iterdir()} == {"localize", info}


def test_the_wheel_states_licence_and_command(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    assert "localize = localize.cli:main" in (info / "entry_points.txt").read_text()
    assert "License-Expression: Apache-2.0" in (info / "METADATA").read_text()
    assert "Apache License" in (info / "licenses" / "LICENSE").read_text()


def test_recipes_are_found_where_the_wheel_is_installed(installed: Path, tmp_path: Path) -> None:
    code = "from localize import recipes; print(*recipes.names()); print(recipes.load('dcl-s').options)"
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(installed), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [" ".join(recipes.names()), "{'dictionary': 'static'}"]


def test_only_lower_bounds_are_asked_for() -> None:
    assert PROJECT["name"] == "torch-localize"
    assert PROJECT["version"] == localize.__version__
    assert all(requirement.count(">=") == 1 for requirement in PROJECT["dependencies"])
    assert not any(mark in "".join(PROJECT["dependencies"]) for mark in ("<", "==", "~=", "@"))


def test_the_lowest_versions_are_those_that_are_declared() -> None:
    printed = subprocess.run([sys.executable, ROOT / ".ci" / "lowest.py"], capture_output=True, text=True, check=True)
    extras = PROJECT["optional-dependencies"]
    declared = [*PROJECT["dependencies"], *extras["data"], *extras["test"]]

    assert printed.stdout.splitlines() == [requirement.replace(">=", "==") for requirement in declared]


def test_importing_localize_does_not_import_torch() -> None:
    code = "import sys, localize; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_public_names_are_there() -> None:
    assert set(localize.__all__) <= set(dir(localize))
    for name in localize.__all__:
        assert getattr(localize, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = localize.nothing


@pytest.mark.slow
def test_transform_and_audit_are_functions_whatever_was_imported_before() -> None:
    """Each order of imports has a process of its own, started from one that has imported the libraries."""
    orders = ("", "import localize.compiler, localize.auditor", "from localize.auditor import static")
    code = (
        "import inspect, os, timm, torchvision\n"
        f"for first in {orders!r}:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        exec(first)\n"
        "        import localize\n"
        "        assert callable(localize.transform) and callable(localize.audit)\n"
        "        assert 'example_input' in inspect.signature(localize.transform).parameters\n"
        "        assert 'batch' in inspect.signature(localize.audit).parameters\n"
        "        break\n"
        "    assert os.waitpid(child, 0)[1] == 0, first\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_source_distribution_holds_the_pages_of_the_documentation() -> None:
    files = {file.relative_path for file in SdistBuilder(str(ROOT)).recurse_included_files()}
    assert {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")} <= files
    assert "docs/cost.md" in files
