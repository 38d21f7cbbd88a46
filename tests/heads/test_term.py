"""What a term takes for its loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from localize.errors import MethodError
from localize.ir import Term
from localize.losses import focal


def half(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target) / 2


class Losses:
    @staticmethod
    def half(prediction: Tensor, target: Tensor) -> Tensor:
        return half(prediction, target)


def test_a_loss_is_a_function_or_its_name() -> None:
    assert Term(F.cross_entropy).loss == "torch.nn.functional.cross_entropy"
    assert Term("torch.nn.functional.cross_entropy").loss == "torch.nn.functional.cross_entropy"
    assert Term(focal).loss == "localize.losses.focal"
    assert Term(half).loss == f"{__name__}.half"


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss,
        nn.CrossEntropyLoss(),
        "cross_entropy",
        "torch.nn.functional.crossentropy",
        "no_such_module.loss",
        "torch.nn.CrossEntropyLoss",
        "",
        None,
        3,
        partial(half),
        lambda prediction, target: half(prediction, target),
        Losses.half,
    ],
)
def test_anything_else_is_refused_where_the_term_is_made(loss: Any) -> None:
    with pytest.raises(MethodError, match=r"(?s)loss .* (is not a f|cannot be im).*at the top of a module"):
        Term(loss)
