"""Tensors arrive with the strides they were sent with; what describes them is put into numbers and back."""

from __future__ import annotations

import pytest
import torch

from localize.pipeline.rank import seed_of
from localize.pipeline.stream import TYPES, form_of, is_dense, read_form


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, 3, 4),
        torch.zeros(2, 3, 4).transpose(1, 2),
        torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.zeros(4, 1, 3).permute(2, 1, 0),
    ],
)
def test_what_fills_its_memory_keeps_its_strides(value: torch.Tensor) -> None:
    assert is_dense(value)
    assert read_form(form_of(value)) == (torch.float32, tuple(value.shape), value.stride())


@pytest.mark.parametrize("value", [torch.zeros(2, 6)[:, ::2], torch.zeros(1, 3).expand(2, 3), torch.zeros(4, 6)[:, :3]])
def test_what_does_not_fill_its_memory_is_copied_first(value: torch.Tensor) -> None:
    assert not is_dense(value)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_that_can_cross_is_told(dtype: torch.dtype) -> None:
    assert read_form(form_of(torch.zeros(3, dtype=dtype)))[0] == dtype


def test_seeds_differ_by_run_batch_and_loss() -> None:
    seeds = {seed_of(run, batch, what) for run in (0, 1) for batch in (0, 1) for what in ("step_0/1", "step_1/1")}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
