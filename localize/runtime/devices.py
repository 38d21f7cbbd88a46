"""Devices by name."""

from __future__ import annotations

import torch

from localize.errors import Advice, MissingError


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``: ``cpu``, ``cuda``, ``cuda:N``, or ``auto`` (cuda where there is one).

    Raises:
        MissingError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    here = ["cpu"]
    if torch.cuda.is_available():
        here += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in here:
        raise MissingError(
            f"there is no device {name!r} here.",
            facts=f"devices are {', '.join(here)}.",
            help=Advice("device='auto'"),
        )
    return torch.device(name)
