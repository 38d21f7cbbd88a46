"""``pytest`` in this folder holds the method to the law that the packaged methods obey."""

from outside import Prototype

import localize.testing


def test_it_obeys_the_common_law() -> None:
    assert localize.testing.check_method(Prototype) == ("ResNet", "MLP", "Tokens")


def test_its_options_count() -> None:
    localize.testing.check_method(Prototype(scale=5.0))
