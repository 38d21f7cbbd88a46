"""The smallest model of every file of timm: those listed in ``timm_families.txt`` that the installed timm has."""

from __future__ import annotations

from pathlib import Path

import timm

LISTED = dict(
    line.split()
    for line in Path(__file__).with_name("timm_families.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)
"""Model by file, of the version of timm that the list names. Earlier versions lack some."""
FAMILIES = {family: name for family, name in LISTED.items() if timm.is_model(name)}
