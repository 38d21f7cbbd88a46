"""Recipes: a method with its options, and what goes with them, as a YAML file.

A recipe names a method; everything else may be left out::

    model: cifar/resnet110
    method: METHOD
    options:
      OPTION: 4
    terms:
    - {branch: own, weight: [0.05, 0.5]}
    - {branch: reconstruction, weight: [5.0, 0.2]}
    cut:
      segments: max
    train:
      epochs: 400
      lr: 0.8

Packaged recipes are found by name (``localize recipes ls``); the name of a method is a recipe too, with the method's
defaults. Reading checks everything: a key that does not exist, a value of the wrong type, an option that the method
does not have are refused with the file, the line, and the nearest valid name.
"""

from localize.recipes.library import Source, load, names, parse, resolve, text
from localize.recipes.schema import FILE_NAME, Expected, Recipe
from localize.recipes.yaml import dump

__all__ = ["FILE_NAME", "Expected", "Recipe", "Source", "dump", "load", "names", "parse", "resolve", "text"]
