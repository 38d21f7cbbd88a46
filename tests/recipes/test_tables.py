"""Recipes of one table of a paper agree, and every number of the papers is in a recipe or in the list of those not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path

import pytest
import yaml

from localize import recipes
from localize.errors import RecipeError
from localize.recipes import Expected, Recipe
from localize.recipes.citations import cited
from tests import shipped
from tests.recipes.numbers import NUMBERS, RIGHT, TABLES

LISTED = Path(__file__).parents[2] / "docs" / "papers.md"
SETTINGS = (
    "data", "augment", "pixel_mean", "pixel_std", "epochs", "batch_size", "opt", "lr", "momentum", "weight_decay",
    "sched", "milestones", "gamma", "warmup_epochs", "warmup_lr",
)  # fmt: skip
"""What the rows of a table share."""

BY_MODEL, BY_SOURCE = "model", "paper"
VARIES: dict[tuple[str, str], str] = {
    ("Ma et al. 2024", "3"): BY_MODEL,  # appendix A.2: each ImageNet net with its own batch, rate and epochs
    ("Zhang et al. 2025", "2"): BY_MODEL,  # the code: batches of 128 and 64
    ("Choi et al. 2024", "3"): BY_SOURCE,  # rows that are taken from Nøkland & Eidnes have the settings of their code
    ("Choi et al. 2024", "I"): BY_MODEL,  # Table VII: FC and Conv
    ("Choi et al. 2024", "II"): BY_MODEL,
    ("Choi et al. 2024", "III"): BY_MODEL,
    ("Choi et al. 2024", "V"): BY_MODEL,  # J.2.3 and J.2.6: ViT and Mixer as VGG8B, ResNet-32 as InfoPro
    ("anonymous 2023", "1"): BY_MODEL,  # Table 5
    ("anonymous 2023", "2"): BY_MODEL,
    ("anonymous 2023", "3"): BY_MODEL,
}
"""What the settings of a table depend on beside the data set. In all other tables, on nothing."""


@cache
def published() -> tuple[tuple[str, str, str, Recipe, Expected], ...]:
    """Return (paper, table, recipe's name, recipe, number) for every number of a table."""
    found = []
    for name in recipes.names():
        recipe = shipped.recipe(name)
        for one in recipe.expected:
            named = re.match(r"Table (?P<table>\d+|[IVX]+)\b(?P<choi> of Choi)?", one.source)
            if named:
                paper = "Choi et al. 2024" if named["choi"] else cited(recipe.paper)
                found.append((paper, named["table"], name, recipe, one))
    return tuple(found)


def groups() -> Iterator[tuple[str, str, str, str]]:
    """Yield a paper, a table, a data set, and what the settings may depend on besides."""
    for paper, table, _, recipe, _ in published():
        kind = VARIES.get((paper, table))
        yield paper, table, recipe.train["data"], getattr(recipe, kind) if kind else ""


@pytest.mark.parametrize("group", sorted(set(groups())), ids=lambda group: " ".join(group)[:70])
def test_recipes_of_one_table_agree_in_what_the_table_does_not_vary(group: tuple[str, str, str, str]) -> None:
    same = {}
    for (_, _, name, recipe, _), mine in zip(published(), groups(), strict=True):
        if mine == group:
            same[name] = {key: recipe.train.get(key) for key in SETTINGS}

    first = next(iter(same.values()))
    assert {name: settings for name, settings in same.items() if settings != first} == {}


def test_what_is_said_to_vary_does() -> None:
    for (paper, table), kind in VARIES.items():
        found = {
            (recipe.train["data"], str([recipe.train.get(key) for key in SETTINGS]))
            for one, other, _, recipe, _ in published()
            if (one, other) == (paper, table)
        }
        assert len(found) > len({data for data, _ in found}), (paper, table, kind)


# ------------------------------------------------------------------------------------------------------- best or last


def test_every_published_number_says_which_epoch_it_is_of() -> None:
    unstated = {name for _, _, name, _, one in published() if one.epoch == "unstated"}
    taken = {name for _, _, name, _, one in published() if "taken from its own paper" in one.source}

    assert unstated == taken  # rows that a table has taken from papers whose code is not at hand
    assert {one.epoch for *_, recipe, one in published() if cited(recipe.paper) == "Nøkland & Eidnes 2019"} == {
        "best", "last",
    }  # fmt: skip


def test_an_epoch_is_best_last_or_unstated() -> None:
    text = recipes.text("dcl-s-fc-mnist")

    with pytest.raises(RecipeError, match=r"expected.0.epoch cannot be 'mean'"):
        recipes.load(yaml.safe_load(text.replace("epoch: best", "epoch: mean")))


# -------------------------------------------------------------------------------------------------- no number is lost


def listed() -> Iterator[tuple[str, str, str, str]]:
    """Yield paper, table, numbers and reason of every line of the list."""
    for line in LISTED.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0] in TABLES:
            paper, table, numbers, reason = cells
            yield paper, table, numbers, reason


@pytest.mark.parametrize(("paper", "table"), NUMBERS, ids=lambda key: key)
def test_every_number_of_a_table_has_a_recipe_or_a_reason_why_not(paper: str, table: str) -> None:
    printed = Counter(map(Decimal, NUMBERS[paper, table].split()))
    reached = Counter(
        Decimal(str(one.value)) * 100 if paper in RIGHT else 100 - Decimal(str(one.value)) * 100
        for mine, its, _, _, one in published()
        if (mine, its) == (paper, table)
    )
    excused = Counter(
        Decimal(number)
        for mine, its, numbers, _ in listed()
        if (mine, its) == (paper, table)
        for number in numbers.split(", ")
    )

    assert not set(reached) - set(printed), "numbers of recipes that the table does not print"
    assert printed - reached == excused


def test_every_table_is_looked_at() -> None:
    without = {(paper, table) for paper, table, numbers, _ in listed() if numbers == "none"}

    assert {(paper, table) for paper, tables in TABLES.items() for table in tables} == {*NUMBERS} | without
    assert not {*NUMBERS} & without
    assert all(reason for *_, reason in listed())
