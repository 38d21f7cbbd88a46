"""Decide which modules are called whole, and not looked into."""

from __future__ import annotations

import torch
from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

STACKS = (nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder)
"""Modules of torch whose forward runs a stack of others; looked into where their forward can be recorded."""


def is_leaf(module: nn.Module) -> bool:
    """Tell whether a module is called as it is, and not looked into.

    Leaves are the modules of ``torch.nn`` and what is derived from them (not containers and stacks), scripted modules,
    modules without children that read ``self.training``, and modules that switch autocast, whose effect a list of calls
    does not show.
    """
    if isinstance(module, _CONTAINERS):
        return False
    if isinstance(module, torch.jit.ScriptModule) or is_of_torch(module):
        return True
    code = getattr(type(module).forward, "__code__", None)
    names = code.co_names if code is not None else ()
    if "training" in names and not any(True for _ in module.children()):
        return True
    return "autocast" in names


def is_of_torch(module: nn.Module) -> bool:
    """Tell whether a module is one of ``torch.nn`` that computes something, or derived from one."""
    if isinstance(module, (*_CONTAINERS, *STACKS)):
        return False
    return any(cls.__module__.startswith("torch.nn.") and cls is not nn.Module for cls in type(module).__mro__)


def takes_tokens_first(module: nn.Module) -> bool:
    """Tell whether a module of torch takes and returns tokens (T, N, C), and not (N, T, C)."""
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        module = module.self_attn
    return isinstance(module, nn.MultiheadAttention) and not module.batch_first
