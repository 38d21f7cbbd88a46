"""The command line: read what was typed, call the function that does it, print what it returns.

These modules import neither torch nor a model library, so ``localize --help`` answers at once. Options of the methods
and of the trainer become flags only when a command that has them is called. Their names, types and meanings are read
from the dataclasses that declare them.
"""

# Importing a file registers its commands, in the order in which --help lists them.
from localize.cli import zoo, extensions, convert, costs, training, analyses, data, recipes, doctor  # noqa: F401, I001
from localize.cli.app import app, main

__all__ = ["app", "main"]
