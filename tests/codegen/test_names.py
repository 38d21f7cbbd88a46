"""Modules and inputs of any name convert: where the text means something else by a name, it says another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import localize

TAKEN = (
    "step", "segment", "segment_0", "step_0", "train_step", "trunk", "heads", "x", "y", "F", "optimizer", "torch",
    "operator", "localize", "h_0", "loss_0", "scores_1", "labels", "images", "error", "share", "run_0", "print",
)  # fmt: skip
UNWRITABLE = ("class", "in", "None", 'a "quoted" one', "back\\slash", "two\nlines", "dash-ed", "0")


class Named(nn.Module):
    """A stack of convolutions under given names."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        for i, name in enumerate(names):
            self.add_module(name, nn.Sequential(nn.Conv2d(3 if i == 0 else 4, 4, 3, 1, 1), nn.ReLU()))
        self.fc = nn.Linear(4, 5)

    def forward(self, image: Tensor) -> Tensor:
        for name in self.names:
            image = getattr(self, name)(image)
        return self.fc(image.mean((2, 3)))


@pytest.mark.parametrize("method", ["auglocal", "dcl", "mlaan"])
@pytest.mark.parametrize("names", [TAKEN[:12], TAKEN[12:], UNWRITABLE], ids=["taken", "taken too", "unwritable"])
def test_modules_of_any_name_convert_and_audit_clean(names: tuple[str, ...], method: str) -> None:
    model = Named(names)
    keys = list(model.state_dict())

    local = localize.transform(model, method, example_input=torch.zeros(2, 3, 8, 8))

    localize.audit(local, (torch.randn(4, 3, 8, 8), torch.arange(4))).raise_if_failed()
    assert list(local.export().state_dict()) == keys


class Taking(nn.Module):
    """Two inputs under names that the text gives a meaning to."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, optimizer: Tensor, h_0: Tensor) -> Tensor:
        return self.fc(self.two(self.one(optimizer).relu() + h_0).relu())


def test_inputs_of_any_name_convert_and_audit_clean() -> None:
    inputs = (torch.randn(4, 4), torch.randn(4, 8))

    local = localize.transform(Taking(), "dgl", example_input=inputs)

    localize.audit(local, (inputs, torch.arange(4))).raise_if_failed()
    assert "optimizer_, h_0_" in local.source
