"""Weights for a model: read from a file without running what is in it, and loaded strictly.

Only a classifier of another number of classes may differ. It keeps the weights it was drawn with, and the caller is
told.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localize.errors import MissingError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Loaded:
    """What a state dict has given a model: a number of tensors; ``drawn`` are the keys of a classifier left alone."""

    tensors: int
    drawn: tuple[str, ...] = ()
    classes: int | None = None
    """Number of classes of the classifier that was left out; None: nothing was."""
    converted: bool = False
    """timm has converted the state dict to this model, as it does with published weights: another image size."""

    def __str__(self) -> str:
        parts = [f"{self.tensors} tensors loaded"]
        if self.converted:
            parts.append("converted by timm for this model")
        if self.drawn:
            parts.append(f"the classifier of {self.classes:,} classes left out, {', '.join(self.drawn)} drawn again")
        return "; ".join(parts)


def load_file(model: nn.Module, path: str | Path, num_classes: int) -> Loaded:
    """Load a state dict of the plain model from a file.

    Args:
        model: its weights are replaced.
        path: ``.safetensors``; else what ``torch.save`` has written: a state dict, or a dict that holds one under
            ``state_dict`` or ``model`` (averaged weights, ``state_dict_ema`` or ``model_ema``, come before them).
            Prefixes of wrappers (``module.``, ``_orig_mod.``) are dropped. Nothing in the file is executed.
        num_classes: classes of ``model``.

    Raises:
        MissingError: there is no such file, it holds no state dict, or that of another model.
    """
    return load_state(model, read(path), num_classes, told=str(path))


def read(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict in a file; see :func:`load_file`.

    Raises:
        MissingError: there is no such file, or it holds no state dict.
    """
    import torch
    from timm.models import load_state_dict

    if not Path(path).is_file():
        folder = Path(path) / "export" / "backbone.safetensors"
        raise MissingError(
            f"there is no file of weights {path}.",
            facts="it is a folder." if Path(path).is_dir() else (),
            help=f"{folder}" if folder.is_file() else "--initial-checkpoint FILE: .safetensors, .pt or .pth",
        )
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # whatever a reader meets in a file that is something else
        raise MissingError(
            f"{path} cannot be read as weights.",
            facts=f"{type(error).__name__}: {str(error).partition(' No automatic')[0] or 'it is not a state dict'}",
            help="a state dict of tensors: torch.save(model.state_dict(), 'weights.pt'), or a .safetensors file",
        ) from error
    wrong = next((key for key, value in state.items() if not isinstance(value, torch.Tensor)), None)
    if wrong is not None or not state:
        raise MissingError(
            f"{path} holds no state dict.",
            facts=f"{wrong} is a {type(state[wrong]).__name__}, not a tensor." if wrong else "it is empty.",
            help="torch.save(model.state_dict(), 'weights.pt')",
        )
    return state


def load_state(model: nn.Module, state: Mapping[str, Tensor], num_classes: int, *, told: str) -> Loaded:
    """Load a state dict strictly, but for a classifier of another number of classes.

    A tensor is of the classifier if its first dimension has ``num_classes`` in the model and another number in
    ``state``, the same for all such tensors, and its other dimensions agree.

    Args:
        model: its weights are replaced.
        state: of the plain model; timm's models may take that of another image size.
        num_classes: classes of ``model``.
        told: what messages call ``state``.

    Raises:
        MissingError: it is the state dict of another model, or contains NaN. The model is as it was.
    """
    own = model.state_dict()
    drawn, wrong = _differences(own, state, num_classes)
    converted = False
    if wrong and (fitted := _converted(model, state)) is not None:
        fitted_drawn, fitted_wrong = _differences(own, fitted, num_classes)
        if not fitted_wrong:
            state, drawn, wrong, converted = fitted, fitted_drawn, (), True
    if wrong:
        raise MissingError(
            f"{told} does not hold the weights of this {type(model).__name__}.",
            facts=wrong,
            help="the weights of the plain model, under its own keys: localize export RUN -o FILE writes such",
        )
    kept = {key: value for key, value in state.items() if key not in drawn}
    bad = [key for key, value in kept.items() if value.is_floating_point() and value.isnan().any()]
    if bad:
        raise MissingError(
            f"{told} contains NaN.",
            facts=f"{len(bad)} of {len(kept)} tensors do: {', '.join(bad[:3])}.",
            help="weights from before training diverged",
        )
    model.load_state_dict({**own, **kept}, strict=True)
    return Loaded(len(kept), drawn, state[drawn[0]].shape[0] if drawn else None, converted)


def _differences(
    own: Mapping[str, Any], state: Mapping[str, Tensor], num_classes: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the keys of a classifier of another size, and lines about everything else that does not fit."""
    sizes = {key: (tuple(own[key].shape), tuple(state[key].shape)) for key in own if key in state}
    differ = {key: pair for key, pair in sizes.items() if pair[0] != pair[1]}
    drawn = tuple(
        key
        for key, (here, there) in differ.items()
        if here and there and here[0] == num_classes and here[1:] == there[1:]
    )
    if len({differ[key][1][0] for key in drawn}) > 1:
        drawn = ()
    found = {
        "missing there": [key for key in own if key not in state],
        "not in the model": [key for key in state if key not in own],
        "of another shape": [f"{key} {differ[key][1]}, here {differ[key][0]}" for key in differ if key not in drawn],
    }
    lines = tuple(
        f"{len(keys)} {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        for what, keys in found.items()
        if keys
    )
    return drawn, lines


def _converted(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the state dict as timm converts published weights for this model; None where timm has nothing to do."""
    module = sys.modules[type(model).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None) if module.__name__.startswith("timm.") else None
    if convert is None:
        return None
    try:
        return dict(convert(dict(state), model))
    except Exception:  # it is made for state dicts of this architecture, and this is another one
        return None
