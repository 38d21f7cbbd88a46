"""Names of torch that its documentation does not promise: each is read here, and nowhere else in the package.

Where a version of torch lacks one, something public stands in for it; where nothing can, the message says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # noqa: PLC0414  the documented import

from localize.errors import MissingError

try:
    from torch.utils import _pytree as pytree
except ImportError:
    from torch.utils import pytree  # type: ignore[no-redef, attr-defined]  # where a later PyTorch may have it

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

tree_leaves = pytree.tree_leaves

CONVOLUTIONS: Any = getattr(nn.modules.conv, "_ConvNd", (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d))
"""Class, or classes, of all convolutions."""
BATCH_NORMS: Any = getattr(
    nn.modules.batchnorm, "_BatchNorm", (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
)
"""Class, or classes, of all BatchNorms."""
RUNNING_NORMS: Any = getattr(nn.modules.batchnorm, "_NormBase", (BATCH_NORMS, nn.InstanceNorm2d))
"""Class, or classes, of all norms that may keep running statistics."""
POOLS: Any = (
    getattr(nn.modules.pooling, "_MaxPoolNd", (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)),
    getattr(nn.modules.pooling, "_AvgPoolNd", (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)),
    getattr(
        nn.modules.pooling, "_AdaptiveAvgPoolNd", (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
    ),
)
"""Classes of max and average pooling."""
DROPOUTS: Any = getattr(nn.modules.dropout, "_DropoutNd", (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d))
"""Class, or classes, of dropout."""


# ------------------------------------------------------------------------------------------------ what a module holds


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the module's own parameters by name, None included: the dict in which it keeps them, to read and write.

    Nothing public gives this dict, nor the next two, and nothing can stand in for them: torch's own methods use them.
    """
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the module's own buffers by name, None included: the dict in which it keeps them, to read and write."""
    return module._buffers


def own_children(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the module's children by name, None and repeated ones included: the dict in which it keeps them."""
    return module._modules


def own_forward_hooks(module: nn.Module) -> list[dict[int, Any]]:
    """Return the dicts in which a module keeps its forward hooks: those before its forward, and those after it."""
    return [module._forward_pre_hooks, module._forward_hooks]


def unsaved_buffers_of(module: nn.Module) -> set[str]:
    """Return the names of the module's own buffers that its state dict leaves out."""
    try:
        return module._non_persistent_buffers_set
    except AttributeError:
        return set(own_buffers(module)) - set(module.state_dict())


def is_compiled(module: nn.Module) -> bool:
    """Say whether ``torch.compile`` has made a module."""
    return hasattr(module, "_orig_mod") or type(module).__name__ == "OptimizedModule"


# ---------------------------------------------------------------------------------------------- what a tensor shows


def version_of(tensor: Tensor) -> int:
    """Return how many times the tensor's storage has been written in place.

    Raises:
        MissingError: this version of torch does not count.
    """
    try:
        return tensor._version
    except AttributeError as error:
        raise MissingError(
            f"torch {torch.__version__} does not count writes to a tensor.",
            facts="Tensor._version is missing; without it a forward that writes in place is not recorded right.",
            help="pip install torch   # a version that pyproject.toml of localize allows",
        ) from error


def storage_of(tensor: Tensor) -> int:
    """Return a number that tensors have in common if they share memory, while any of them lives."""
    storage = tensor.untyped_storage()
    try:
        return storage._cdata
    except AttributeError:
        return id(storage)


def is_fake(value: Any) -> bool:
    """Say whether a value is a tensor without data of a :func:`fake_mode`."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def fake_mode() -> FakeTensorMode:
    """Return a mode in which operations compute shapes and no values; it takes real tensors as well.

    Raises:
        MissingError: this version of torch has none.
    """
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise MissingError(
            f"torch {torch.__version__} has no tensors without data.",
            facts="torch._subclasses.fake_tensor is missing, by which memory and time are predicted.",
            help="pip install torch   # a version that pyproject.toml of localize allows",
        ) from error
    return FakeTensorMode(allow_non_fake_inputs=True)


class FakeTensors:
    """Makes tensors of the active :func:`fake_mode` directly: its own functions take five times as long."""

    def __init__(self) -> None:
        self._mode = torch.empty(0).fake_mode  # type: ignore[attr-defined]  # a fake tensor's

    def empty(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of this form on the CPU."""
        with outside_modes():
            return self._on_cpu(torch.empty_strided(shape, stride, dtype=dtype, device="meta"))

    def like(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the form of another, a parameter if that is one."""
        made = self.empty(tensor.shape, tensor.stride(), tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            made.requires_grad_(tensor.requires_grad)
            made._is_param = True  # as nn.Parameter does it for classes of tensors
        return made

    def view(
        self, storage: Any, shape: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype
    ) -> Tensor:
        """Return a tensor of this form that shares the (untyped) storage of other fake tensors."""
        with outside_modes():
            return self._on_cpu(torch.empty(0, dtype=dtype, device="meta").set_(storage, offset, shape, stride))

    def _on_cpu(self, meta: Tensor) -> Tensor:
        from torch._subclasses.fake_tensor import FakeTensor

        return FakeTensor(self._mode, meta, torch.device("cpu"))


def outside_modes() -> AbstractContextManager[Any]:
    """Return a context in which no mode sees operations."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


# -------------------------------------------------------------------------------------------------------- functions

OPERATIONS: Any = (type(torch.ops.aten.relu), type(torch.ops.aten.relu.default))
"""Classes of what ``torch.ops`` holds."""


def without_overload(operation: Any) -> Any:
    """Return the operation of ``torch.ops`` by its shortest name: ``aten.relu`` for ``aten.relu.default``."""
    return operation.overloadpacket if str(operation).endswith(".default") else operation


def outside_of_modes() -> AbstractContextManager[Any]:
    """Return a context in which no mode sees the torch functions that are called."""
    return torch._C.DisableTorchFunction()


def code_of_scripted(function: Any) -> Any:
    """Return the Python function that a scripted function was made from; None if there is none, as after a trace."""
    return getattr(function, "_torchdynamo_inline", None)


# ------------------------------------------------------------------------------------ one operation on many tensors


def divide_all(tensors: Sequence[Tensor], number: float) -> None:
    """Divide tensors by a number, in place."""
    if hasattr(torch, "_foreach_div_"):
        torch._foreach_div_(list(tensors), number)
    else:
        for tensor in tensors:
            tensor.div_(number)


def lerp_all(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Move tensors towards others, in place: t <- t + weight * (end - t)."""
    if hasattr(torch, "_foreach_lerp_"):
        torch._foreach_lerp_(list(tensors), list(ends), weight)
    else:
        for tensor, end in zip(tensors, ends, strict=True):
            tensor.lerp_(end, weight)


def copy_all(tensors: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy the values of other tensors, in place."""
    if hasattr(torch, "_foreach_copy_"):
        torch._foreach_copy_(list(tensors), list(sources))
    else:
        for tensor, source in zip(tensors, sources, strict=True):
            tensor.copy_(source)


def largest_of_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the largest absolute value of each tensor; infinite or not a number where any of its values is."""
    if hasattr(torch, "_foreach_norm"):
        return list(torch._foreach_norm(list(tensors), ord=float("inf")))
    return [torch.linalg.vector_norm(tensor, ord=float("inf")) for tensor in tensors]


def writes_arguments(operation: Any) -> bool:
    """Say whether an operation of aten writes into one of its arguments; by its name where torch does not say."""
    try:
        return bool(operation._schema.is_mutable)
    except AttributeError:
        return operation.overloadpacket.__name__.endswith("_")


def norm_gradients(dy: Tensor, x: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradients (C,) of weight and bias of a norm over dimension 1 with given statistics.

    Args:
        dy: gradient of its output (N, C, ...).
        x: its input.
        mean: of each channel.
        var: of each channel.
        eps: what is added to the variance.
    """
    if x.dtype not in (torch.float32, torch.float64):
        x, dy = x.float(), dy.float()
    if is_fake(x):  # without values, the kernel would make the gradient of x too
        return torch.empty_like(mean), torch.empty_like(mean)
    kernel = getattr(torch.ops.aten, "native_batch_norm_backward", None)
    if kernel is not None:
        return kernel(dy, x, None, mean, var, None, None, False, eps, [False, True, True])[1:]
    dims = [0, *range(2, x.dim())]
    normalised = torch.nn.functional.batch_norm(x, mean, var, None, None, False, 0.0, eps)
    return (dy * normalised).sum(dims), dy.sum(dims)


# --------------------------------------------------------------------------------------------------------- processes


def set_timeout(seconds: timedelta) -> None:
    """Let collectives between all processes fail that take longer from now on."""
    if hasattr(torch.distributed, "set_timeout"):
        torch.distributed.set_timeout(seconds)
        return
    from torch.distributed.distributed_c10d import _set_pg_timeout  # before PyTorch 2.14

    _set_pg_timeout(seconds)


# ------------------------------------------------------------------------------------------------------- compilation


def compile_graph(graph: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> Any:
    """Compile a graph of operations by Inductor, without guards and without autograd.

    Raises:
        Exception: whatever Inductor raises where it cannot, such as without a C++ compiler.
    """
    import torch._inductor

    return torch._inductor.compile(graph, list(inputs), options=options)
