"""Errors carry what they are about as data, and survive a trip between processes."""

from __future__ import annotations

import copy
import pickle

import pytest

from localize import errors, methods
from localize.errors import LocalizeError, MissingError, OptionError, RecipeError


@pytest.mark.parametrize(
    "error",
    [
        OptionError("d cannot be 1.", facts=["the lowest value is 2."], help="d=2", option="d"),
        RecipeError("lr cannot be -1.", facts="it must be above 0.", keys=("train", "lr")),
        errors.ReportedError("another process says so.", MissingError.exit_code),
        errors.VersionError("plan.json is of version 2.", help="pip install"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_keeps_its_data_when_it_is_pickled_or_copied(error: LocalizeError) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert vars(again) == vars(error)
        assert str(again) == str(error)


@pytest.mark.parametrize(
    ("method", "options", "about"),
    [
        ("auglocal", {"dd": 3}, "dd"),
        ("auglocal", {"d": 1}, "d"),
        ("auglocal", {"d": True}, "d"),
        ("auglocal", {"selection": "uniform,sideways"}, "selection"),
        ("dcl", {"tau": float("nan")}, "tau"),
    ],
)
def test_an_error_says_which_option_it_is_about(method: str, options: dict, about: str) -> None:
    with pytest.raises(OptionError, match="option") as caught:
        methods.create(method, **options)

    assert caught.value.option == about
