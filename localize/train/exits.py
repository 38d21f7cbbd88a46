"""Export the trained model of a run as a program: the whole model, or the model up to a local head (early exit).

A program contains its weights and needs neither this package nor the model's code. ``torch.export.load`` reads
``.pt2``, and any ONNX runtime reads ``.onnx``. It is checked against the outputs of the run in eval mode.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localize import inference
from localize.errors import MissingError, ModelError, OptionError
from localize.files import replacing
from localize.graph.outputs import output_called
from localize.graph.twin import real_copy
from localize.runtime.model import LocalModel, load
from localize.train import pretrained_cfg, runs

FORMATS = ("pt2", "onnx")
IMAGES = 2
"""Number of images with which a program is recorded; the recorded program takes any number."""
TOLERANCE = 1e-4
"""Largest allowed difference of outputs, relative to the largest output: another runtime may round differently."""


class Scores(nn.Module):
    """A model without its other outputs: images (N, C, H, W) -> class scores (N, Z)."""

    def __init__(self, local: LocalModel) -> None:
        super().__init__()
        self.model, self.output = local.export(), local.plan.segments.trunk.output_in_eval

    def forward(self, x: Tensor) -> Tensor:
        return output_called(self.model(x), self.output)


class UpTo(nn.Module):
    """A model up to a local head: images (N, C, H, W) -> class scores (N, Z) of one layer."""

    def __init__(self, local: LocalModel, depth: inference.Depth) -> None:
        super().__init__()
        self.trunk, self.heads = local.trunk, local.heads
        self.segments = local.plan.segments.segments[: depth.segment + 1]
        self.roots = 2 if local.plan.feedback else 1
        terms = [(loss, term) for loss in local.plan.losses for term in loss.terms]
        names = [loss.name if term is loss.scored else f"{loss.name}.{term.head}" for loss, term in terms]
        self.term = terms[names.index(depth.name)][1]
        self.functions = load(local.source, local.filename)

    def forward(self, x: Tensor) -> Tensor:
        values: tuple[Any, ...] = (x,)
        read: tuple[Any, ...] = ()
        for segment in self.segments:
            result = self.functions[segment.name](*(self.trunk, self.heads)[: self.roots], *values)
            results = result if isinstance(result, tuple) else (result,)
            values = results[: len(results) - len(segment.sides)]
            read = values[: len(values) - len(segment.handed_on)]
        shared = [self.heads[use.block]() for use in self.term.uses]
        return read[0] if self.term.head is None else self.heads[self.term.head](*read, *shared)


def export_program(
    run: str | Path,
    output: str | Path,
    *,
    format: str,
    at: str | None = None,
    force: bool = False,
    trust_code: bool = False,
) -> str:
    """Write a run's model as a program, with ``config.json`` next to it.

    Args:
        run: the folder of a finished run.
        output: file to write.
        format: ``pt2`` or ``onnx``.
        at: only up to this layer, with its head, see :func:`localize.inference.depth`; default: the whole model.
        force: replace the files if they exist.
        trust_code: run the code file that the run names, see :mod:`localize.recipes.trust`.

    Returns:
        One line about what was written and compared.

    Raises:
        OptionError: there is no such format, the file name has a different ending, or the model has several inputs.
        UnknownNameError: there is no such layer.
        MissingError: the run cannot be read, the file exists, or the package for the format is not installed.
        ModelError: the model cannot be recorded as a program.
        ExportError: the program's outputs differ from those of the run.
    """
    folder, path = Path(run), Path(output)
    if format not in FORMATS or path.suffix != f".{format}":
        raise OptionError(
            f"{output} cannot be written as {format!r}.",
            facts=f"formats are {', '.join(FORMATS)}, and the file name must end in the format.",
            help=f"--format {format} -o {path.with_suffix('.' + format).name}" if format in FORMATS else "--format pt2",
        )
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if format == "onnx" and missing:
        raise MissingError(f"--format onnx needs {' and '.join(missing)}.", help="pip install onnx onnxscript")
    runs.refuse_leading_out(path)
    if path.exists() and not force:
        raise MissingError(f"{output} exists.", help="choose another name, or --force to replace it")
    local, recipe = runs.load(folder, heads=at is not None, trust_code=trust_code)
    recipe = runs.fed(folder, recipe)
    if len(local.plan.segments.trunk.arguments) != 1:
        raise OptionError("a model of several inputs cannot be exported as a program.", help="leave out --format")
    local.eval()
    model: nn.Module = _whole(local) if at is None else UpTo(local, inference.depth(local, at))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(IMAGES, *local.plan.segments.trunk.input_shape, generator=generator)
    with torch.no_grad():
        expected = model(x) if at is None else local.scores(x)[inference.depth(local, at).name]
    text = pretrained_cfg.dump(pretrained_cfg.config(recipe))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        found = _written(real_copy(model).eval(), x, temporary, format)
        difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        if not difference <= TOLERANCE:
            raise runs.ExportError(
                f"the {format} program does not compute what the model of {folder} computes.",
                facts=f"on {IMAGES} random images its outputs differ by {difference:.2g} of the largest.",
                help="localize export without --format, to write the weights",
            )
    with replacing(path.with_name(pretrained_cfg.CONFIG)) as temporary:
        temporary.write_text(text, encoding="ascii")
    what = "the model" if at is None else f"the model up to {at}"
    return f"{path}: {what}; outputs on {IMAGES} random images equal those of the run within {difference:.1g}"


def _whole(local: LocalModel) -> nn.Module:
    one = local.plan.segments.trunk.output_in_eval == "output"
    return local.export() if one else Scores(local)


def _written(model: nn.Module, x: Tensor, path: Path, format: str) -> Tensor:
    """Write a program, read it back, and return its outputs on ``x`` (N, C, H, W)."""
    try:
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False)
        if format == "pt2":
            torch.export.save(program, path)
            return torch.export.load(path).module()(x).detach()
        onnx: Any = torch.onnx.export(program, (x,), dynamo=True, verbose=False)
        onnx.save(str(path))
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError, NotImplementedError) as error:
        raise ModelError(
            f"the model cannot be recorded as a {format} program.",
            facts=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}",
            help="localize export without --format, to write the weights",
        ) from error
    return _run_onnx(path, x, program)


def _run_onnx(path: Path, x: Tensor, program: Any) -> Tensor:
    """Return the outputs of an ONNX file with onnxruntime or, if that is not installed, with the original program."""
    if importlib.util.find_spec("onnxruntime") is None:
        return program.module()(x).detach()
    onnxruntime = importlib.import_module("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (one.name for one in session.get_inputs())
    return torch.from_numpy(session.run(None, {name: x.numpy()})[0])
