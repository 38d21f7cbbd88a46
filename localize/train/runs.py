"""The folder of a run: what was asked, one line of metrics per epoch, and the trained model under its own keys.

::

    recipe.yaml                   model, method, options, cut, and every training setting: the whole run, as a recipe
    metrics.jsonl                 one JSON object per epoch, each written whole
    checkpoints/step-N.pt         the run behind its Nth optimizer step, to go on from: the last two
    heads.safetensors             what training added to the model, for inference by local losses
    export/backbone.safetensors   the user's model, original state-dict keys only
    segments.csv                  metrics.jsonl as a table: one line per epoch and local loss
    events.out.tfevents.*         metrics.jsonl for TensorBoard, where that was asked for
    cost.json                     hours and machine, where localize compare --train has made the run
    wandb-id                      by which Weights & Biases knows the run, where that was asked for
    .lock                         held by the process that trains into the folder; empty
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from localize import build, recipes
from localize.compiler import transform
from localize.errors import LocalizeError, MissingError, ModelError, OptionError
from localize.files import replacing
from localize.recipes import Recipe
from localize.recipes.settings import TrainConfig
from localize.runtime.model import LocalModel
from localize.train import checkpoints
from localize.zoo import input_shape_of, resolve

METRICS = "metrics.jsonl"
SEGMENTS = "segments.csv"
HEADS = "heads.safetensors"
BACKBONE = Path("export") / "backbone.safetensors"
EVENTS = "events.out.tfevents.*"
WANDB_ID = "wandb-id"
COST = "cost.json"
LOCK = ".lock"


VERIFIED_IMAGES = 4
"""Random images on which an exported file is compared with its run."""


class ExportError(LocalizeError, AssertionError):
    """An exported file does not make the model that the run has trained."""

    exit_code = 1


def named(output: str, *, force: bool = False) -> Path:
    """Return the folder that the user names for a new run, without making it.

    Raises:
        MissingError: it exists and is not empty (unless ``force``), or is a file.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise MissingError(f"output {output} is a file.", help="--output with the name of a new folder")
    if not force and not _is_free(folder):
        raise MissingError(
            f"output folder {output} exists and is not empty.",
            facts=f"it holds {', '.join(_contents(folder)[:5])}.",
            help=f"another --output, --force to replace the run that is in it, or --resume {output} to go on with it",
        )
    return folder


def numbered(name: str) -> Path:
    """Return ``runs/NAME``, or the first of ``runs/NAME-2``, ``runs/NAME-3``, ... that is free, without making it."""
    wanted = Path("runs") / re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.")
    folder, count = wanted, 1
    while not _is_free(folder):
        count += 1
        folder = wanted.with_name(f"{wanted.name}-{count}")
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process from training into the folder while the body runs. It is made if it is not there.

    The system takes the lock back from a process that ends, however it ends: one that is killed leaves none.

    Raises:
        MissingError: another process trains into the folder, or it cannot be written.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise MissingError(
            f"another process is training into {folder}.",
            facts=f"it holds {folder / LOCK}, which the system gives back when that process ends.",
            help=f"another --output; or stop that process, then localize train --resume {folder}",
        ) from error
    except OSError as error:
        raise MissingError(f"output folder {folder} cannot be written.", facts=str(error)) from error
    try:
        yield
    finally:
        lock.release()


def start(folder: Path, recipe: Recipe) -> None:
    """Make the folder and write the recipe; what an earlier run left in it is removed.

    Raises:
        MissingError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (folder / METRICS, folder / HEADS, folder / BACKBONE, *checkpoints.files(folder)):
            stale.unlink(missing_ok=True)
        for stale in (folder / SEGMENTS, folder / COST, folder / WANDB_ID, *folder.glob(EVENTS)):
            stale.unlink(missing_ok=True)
        with replacing(folder / recipes.FILE_NAME) as path:
            path.write_text(recipes.dump(recipe), encoding="utf-8")
    except OSError as error:
        raise MissingError(f"output folder {folder} cannot be written.", facts=str(error)) from error


def append_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Add one line to ``metrics.jsonl``, in a single write: an interrupted run leaves whole lines.

    Raises:
        MissingError: it cannot be written; the file is as it was.
    """
    line = (json.dumps(metrics, allow_nan=False) + "\n").encode()
    with writing(folder, METRICS):
        descriptor = os.open(folder / METRICS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if os.write(descriptor, line) < len(line):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def keep_metrics(folder: Path, epochs: int) -> list[dict[str, Any]]:
    """Return the lines of the first ``epochs`` epochs; those behind them are removed from ``metrics.jsonl``.

    Raises:
        MissingError: there are fewer, or not what :func:`append_metrics` writes; or the file cannot be written.
    """
    path = folder / METRICS
    content = path.read_bytes() if path.is_file() else b""
    kept = b"".join(content.splitlines(keepends=True)[:epochs])
    try:
        metrics = [json.loads(line) for line in kept.splitlines()]
        whole = [line["epoch"] for line in metrics] == list(range(1, epochs + 1)) and kept.count(b"\n") == epochs
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise MissingError(
            f"{path} does not hold the {epochs} epochs before the checkpoint.",
            facts=f"it has {content.count(10)} lines; one of epochs 1 to {epochs} is missing or is no metrics.",
            help=f"put {METRICS} of this run back, or begin anew: localize train --recipe {folder} --output NEW",
        )
    if kept != content:
        with writing(folder, METRICS), replacing(path) as temporary:
            temporary.write_bytes(kept)
    return metrics


def finish(folder: Path, local: LocalModel) -> None:
    """Write the weights of a finished run: the heads, if there are any, and then the user's model.

    Raises:
        ModelError: see :func:`write_state`.
        MissingError: they cannot be written.
    """
    with writing(folder, "the trained weights"):
        if local.heads.state_dict():
            write_state(local.heads, folder / HEADS)
        write_state(local.export(), folder / BACKBONE)


@contextmanager
def writing(folder: Path, what: str) -> Iterator[None]:
    """Say so where ``what`` cannot be written to the folder of a run, which can go on later.

    Raises:
        MissingError: it cannot be written.
    """
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise MissingError(
            f"{what} cannot be written to {folder}.",
            facts=str(error),
            help=f"make room, then localize train --resume {folder}",
        ) from error


def write_state(model: nn.Module, path: Path) -> None:
    """Write the state dict of ``model``, on the CPU, atomically: every key of it, so that it loads strictly.

    Tensors that share memory (tied weights) are written once for each of their keys.

    Args:
        model: the user's model, or its heads.
        path: ends in ``.safetensors``, or in ``.pt`` or ``.pth`` for ``torch.save``.

    Raises:
        ModelError: a value of the state dict is not a tensor, which safetensors cannot hold.
    """
    state = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in tensors_of(model).items()
    }
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            temporary.touch()
            mode = temporary.stat().st_mode
            safetensors.torch.save_file(state, temporary, metadata={"format": "pt"})
            temporary.chmod(mode)  # what any new file gets here; save_file lets nobody else read its own
        else:
            torch.save(state, temporary)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of ``model``.

    Raises:
        ModelError: a value of it is not a tensor.
    """
    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"the model's state holds something that is not a tensor: {key}.",
                facts=f"it is a {type(value).__name__}; safetensors files hold tensors only.",
            )
    return state


def export(run: str | Path, output: str | Path, *, force: bool = False) -> Path:
    """Write the model that a run has trained to a file of its own: original keys only.

    The weights are first loaded, strictly, into a new model of the same name; that model's state is what is written.

    Args:
        run: the folder of a finished run.
        output: file to write; its ending says how: ``.safetensors``, ``.pt`` or ``.pth``.
        force: replace ``output`` if it exists.

    Raises:
        OptionError: the ending is another one.
        MissingError: ``run`` is not the folder of a finished run, its weights are not those of its model, or
            ``output`` exists.
    """
    folder, path = Path(run), Path(output)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise OptionError(
            f"{output} does not say which format to write.",
            facts="endings are .safetensors, .pt and .pth.",
            help=f"-o {path.with_suffix('.safetensors')}",
        )
    if path.exists() and not force:
        raise MissingError(f"{output} exists.", help="another name, or --force to replace it")
    model = restore(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_state(model, path)
    except OSError as error:
        raise MissingError(f"{output} cannot be written.", facts=str(error)) from error
    return path


def recipe_of(folder: Path) -> Recipe:
    """Return the recipe of a run, finished or not.

    Raises:
        MissingError: the folder is not that of a run.
        RecipeError: its recipe is none.
    """
    path = folder / recipes.FILE_NAME
    if not path.is_file():
        raise MissingError(
            f"{folder} is not the folder of a run.",
            facts=f"it has no {path.name}." if folder.is_dir() else "there is no such folder.",
            help="localize train MODEL --output DIR makes one",
        )
    recipe = recipes.load(path)
    if recipe.model is None:
        raise MissingError(f"{path} is not the recipe of a run.", facts="it does not say which model.")
    return recipe


def config_of(recipe: Recipe) -> TrainConfig:
    """Return what the recipe of a run asks for."""
    assert recipe.model is not None, "it is that of a run"
    return TrainConfig(recipe.model, recipe=recipe, input_shape=recipe.input_shape, **recipe.train)


def verify(run: str | Path, path: str | Path) -> str:
    """Read an exported file back into a fresh model, and compare it with the run's model, bit for bit.

    Compared are all tensors of their states, and what they compute in eval mode on the same random images.

    Args:
        run: the folder of a finished run.
        path: the file, as :func:`export` writes it.

    Returns:
        What was compared, in one line.

    Raises:
        ExportError: the file does not load strictly, or a tensor or an output differs.
        MissingError: ``run`` is not the folder of a finished run.
    """
    trained = restore(Path(run))
    recipe = recipe_of(Path(run))
    fresh = build.create_model(recipe)
    try:
        fresh.load_state_dict(_read_state(Path(path)), strict=True)
    except RuntimeError as error:
        raise ExportError(f"{path} does not load into a fresh {recipe.model}.", facts=str(error)) from error
    help = f"localize export {run} -o {path} --force --verify"
    state = fresh.state_dict()
    changed = [key for key, value in trained.state_dict().items() if not _same_bits(value, state[key])]
    if changed:
        raise ExportError(
            f"{path} does not hold the weights of {run}.",
            facts=f"{len(changed)} tensors differ: {', '.join(changed[:3])}",
            help=help,
        )
    shape = input_shape_of(resolve(recipe.model), fresh, recipe.input_shape)
    like = next(fresh.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(VERIFIED_IMAGES, *shape, generator=generator).to(like.dtype)
    ours, theirs = _outputs(trained, x), _outputs(fresh, x)
    if not all(_same_bits(one, two) for one, two in zip(ours, theirs, strict=True)):
        largest = max(float((one.double() - two.double()).abs().max()) for one, two in zip(ours, theirs, strict=True))
        raise ExportError(
            f"{path} does not make the model that {run} has trained.",
            facts=[
                f"on {len(x)} random images the outputs differ by up to {largest:.3g} in eval mode.",
                "their weights are the same: the model computes with something that its state dict does not hold.",
            ],
            help="in the model, register_buffer (persistent) for every tensor that is not a parameter",
        )
    return (
        f"verified: a fresh {recipe.model} takes the file strictly; its {len(state)} tensors, and its logits on "
        f"{len(x)} random images, are those of the run bit for bit"
    )


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True)


def _outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return every tensor that a model answers with, in eval mode."""
    with torch.no_grad():
        return [value for value in tree_leaves(model.eval()(x)) if isinstance(value, Tensor)]


def _same_bits(one: Tensor, two: Tensor) -> bool:
    same = one.shape == two.shape and one.dtype == two.dtype
    return same and torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))


def restore(folder: Path) -> nn.Module:
    """Build the model of a finished run and load its exported weights strictly.

    Raises:
        MissingError: the folder is not that of a finished run, or the weights are not those of its model.
        RecipeError: its recipe is none.
    """
    recipe, weights = recipe_of(folder), folder / BACKBONE
    if not weights.is_file():
        raise MissingError(
            f"the run in {folder} has not finished.",
            facts=f"it has no {BACKBONE}, which is written at the end.",
            help=f"localize train --resume {folder}",
        )
    model = build.create_model(recipe)
    try:
        model.load_state_dict(safetensors.torch.load_file(weights), strict=True)
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise MissingError(f"{weights} does not hold the weights of {recipe.model}.", facts=str(error)) from error
    return model


def load(folder: Path, *, heads: bool = True) -> tuple[LocalModel, Recipe]:
    """Make the local model that a run has trained, and return it with the run's recipe.

    Args:
        folder: of a finished run.
        heads: they are needed. Otherwise they may be missing (and are then fresh), unless no loss trains the model's
            own output.

    Raises:
        MissingError: see :func:`restore`; or the heads' weights are missing, or are those of other heads.
        LocalizeError: the recipe cannot be carried out.
    """
    model = restore(folder)
    recipe = recipe_of(folder)
    source = resolve(recipe.model)
    shape = input_shape_of(source, model, recipe.input_shape)
    like = next(model.parameters())
    local = transform(model, recipe, example_input=torch.zeros(2, *shape, dtype=like.dtype), name=source.name)
    path = folder / HEADS
    heads = heads or not local.plan.outputs
    if local.heads.state_dict() and (heads or path.is_file()):
        if not path.is_file():
            raise MissingError(
                f"the run in {folder} keeps no heads, and local losses answer by theirs.",
                facts=f"it has no {HEADS}, which is written at the end.",
                help="localize train again; or localize eval without options, which asks the model itself",
            )
        try:
            local.heads.load_state_dict(safetensors.torch.load_file(path), strict=True)
        except (RuntimeError, safetensors.SafetensorError) as error:
            raise MissingError(f"{path} does not hold the weights of these heads.", facts=str(error)) from error
    return local, recipe


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not _contents(folder))


def _contents(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if child.name != LOCK)
