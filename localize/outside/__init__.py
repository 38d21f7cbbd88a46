"""What comes from outside of the package: code that is named, and what installed packages offer.

``FILE.py:NAME`` is a name in a Python file, ``module:NAME`` one in a module that can be imported from where you are;
an entry point of an installed package has a name of its own.
"""

from localize.outside.code import CodeError, is_spelled, load, load_file, origin, spelled, told
from localize.outside.offers import Offer, offered, offers

__all__ = ["CodeError", "Offer", "is_spelled", "load", "load_file", "offered", "offers", "origin", "spelled", "told"]
