"""The folder of a run: its settings, one line of metrics per epoch, and the trained model under its own keys.

::

    recipe.yaml                   model, method, options, cut, every training setting, preprocessing, and a
                                  fingerprint of the data: the whole run, as a recipe
    data.json                     names and sizes of the image files
    metrics.jsonl                 one JSON object per epoch, each written in one step
    checkpoints/step-N.pt         the run after its Nth optimizer step, to resume from: the last two
    checkpoints/step-N/           the same for a pipeline, in parts: see :mod:`localize.train.sharded`
    heads.safetensors             the heads that training added, for inference with local losses
    export/backbone.safetensors   the user's model, original state-dict keys only
    export/config.json            its preprocessing, and the meaning of its outputs, in timm's format
    segments.csv                  metrics.jsonl as a table: one line per epoch and local loss
    events.out.tfevents.*         metrics.jsonl for TensorBoard, on request
    cost.json                     hours and machine, if localize compare --train made the run
    wandb-id                      the run's id at Weights & Biases, on request
    .lock                         held by the process that trains into the folder; empty
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from localize import build, recipes
from localize.compiler import transform
from localize.errors import LocalizeError, MissingError, ModelError, OptionError
from localize.files import replacing
from localize.recipes import Recipe, trust
from localize.recipes.settings import TrainConfig
from localize.runtime.model import LocalModel
from localize.torch_names import tree_leaves
from localize.train import checkpoints, pretrained_cfg
from localize.train.data import fingerprint
from localize.train.data.fingerprint import Listing
from localize.zoo import input_shape_of, resolve

METRICS = "metrics.jsonl"
SEGMENTS = "segments.csv"
HEADS = "heads.safetensors"
EXPORT = Path("export")
BACKBONE = EXPORT / "backbone.safetensors"
CONFIG = EXPORT / pretrained_cfg.CONFIG
EVENTS = "events.out.tfevents.*"
WANDB_ID = "wandb-id"
COST = "cost.json"
LOCK = ".lock"


VERIFIED_IMAGES = 4
"""Number of random images on which an exported file is compared with its run."""
PIECE = 2**26
"""Largest number of bytes that are held to write a model in pieces, if no single tensor is larger."""


class ExportError(LocalizeError, AssertionError):
    """An exported file does not reproduce the trained model of the run."""

    exit_code = 1


def named(output: str, *, force: bool = False) -> Path:
    """Return the folder for a new run that the user named, without creating it.

    Raises:
        MissingError: it exists and is not empty (unless ``force``), or is a file.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise MissingError(f"output {output} is a file.", help="use --output with the name of a new folder")
    if not force and not _is_free(folder):
        raise MissingError(
            f"output folder {output} exists and is not empty.",
            facts=f"it contains {', '.join(_contents(folder)[:5])}.",
            help=f"another --output, --force to replace the run in it, or --resume {output} to continue that run",
        )
    return folder


def numbered(name: str) -> Path:
    """Return the first free folder of ``runs/NAME``, ``runs/NAME-2``, ``runs/NAME-3``, ..., without creating it."""
    wanted = Path("runs") / re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.")
    folder, count = wanted, 1
    while not _is_free(folder):
        count += 1
        folder = wanted.with_name(f"{wanted.name}-{count}")
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training into the folder while the body runs. The folder is created if needed.

    The system releases the lock of a process that ends in any way, so a killed process leaves no lock.

    Raises:
        MissingError: another process is training into the folder, or it cannot be written.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refuse_links(folder)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise MissingError(
            f"another process is training into {folder}.",
            facts=f"it holds {folder / LOCK}, which the system releases when that process ends.",
            help=f"another --output; or stop that process, then localize train --resume {folder}",
        ) from error
    except OSError as error:
        raise MissingError(f"output folder {folder} cannot be written.", facts=str(error)) from error
    try:
        yield
    finally:
        lock.release()


def start(folder: Path, recipe: Recipe, listing: Listing | None = None) -> None:
    """Create the folder and write the recipe and the data listing; files of an earlier run in it are removed.

    Raises:
        MissingError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (folder / METRICS, folder / HEADS, folder / BACKBONE, folder / CONFIG, *checkpoints.files(folder)):
            stale.unlink(missing_ok=True)
        for stale in (folder / SEGMENTS, folder / COST, folder / WANDB_ID, *folder.glob(EVENTS)):
            stale.unlink(missing_ok=True)
    except OSError as error:
        raise MissingError(f"output folder {folder} cannot be written.", facts=str(error)) from error
    clean(folder)
    write_recipe(folder, recipe, listing or Listing())


def write_recipe(folder: Path, recipe: Recipe, listing: Listing) -> None:
    """Write the data listing, and then the recipe, of a run that this user owns.

    Raises:
        MissingError: they cannot be written.
    """
    try:
        with replacing(folder / fingerprint.FILE_NAME) as path:
            path.write_text(fingerprint.dump(listing), encoding="ascii")
        with replacing(folder / recipes.FILE_NAME) as path:
            path.write_text(recipes.dump(recipe), encoding="utf-8")
    except OSError as error:
        raise MissingError(f"output folder {folder} cannot be written.", facts=str(error)) from error
    trust.remember(recipe)


def refuse_links(folder: Path) -> None:
    """Refuse a run folder if something to be written in it is a link, which would lead out of the folder.

    Raises:
        MissingError: there is such a link.
    """
    names = (recipes.FILE_NAME, fingerprint.FILE_NAME, METRICS, checkpoints.FOLDER, HEADS, EXPORT, BACKBONE, CONFIG)
    for name in (*names, SEGMENTS, COST, WANDB_ID, LOCK):
        path = folder / name
        if path.is_symlink():
            raise MissingError(
                f"{path} is a link to {os.readlink(path)}.",
                facts="a run writes into its own folder only.",
                help=f"rm {path}, or replace the link with a copy of its target",
            )


def clean(folder: Path) -> None:
    """Remove files that a killed process was writing. The caller must hold the lock of the run."""
    for place in (folder, folder / EXPORT, folder / checkpoints.FOLDER):
        for left in place.glob(".*") if place.is_dir() and not place.is_symlink() else ():
            if _TEMPORARY.fullmatch(left.name) and left.is_file() and not left.is_symlink():
                left.unlink()


_TEMPORARY = re.compile(r"\.(recipe|data|metrics|segments|heads|backbone|config|cost|wandb-id|step-\d+)-\d+(\.[a-z]+)?")
"""Names that :func:`localize.files.replacing` gives to temporary files of a run."""


def append_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Add a line to ``metrics.jsonl`` in a single write, so that an interrupted run leaves only complete lines.

    Raises:
        MissingError: it cannot be written; the file is unchanged.
    """
    line = lines_of([metrics]).encode()
    no_links = getattr(os, "O_NOFOLLOW", 0)  # Windows has none
    with writing(folder, METRICS):
        descriptor = os.open(folder / METRICS, os.O_WRONLY | os.O_CREAT | os.O_APPEND | no_links, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if os.write(descriptor, line) < len(line):
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def keep_metrics(folder: Path, metrics: str) -> list[dict[str, Any]]:
    """Restore ``metrics.jsonl`` from the lines in a checkpoint, and return them.

    Lines of later epochs are removed. If the file was damaged, a line on stderr reports that it was restored.

    Raises:
        MissingError: the file cannot be written.
    """
    path = folder / METRICS
    content = path.read_bytes() if path.is_file() else b""
    kept = metrics.encode()
    if content != kept:
        if not content.startswith(kept):
            print(f"{path} was damaged or missing; restored from the checkpoint", file=sys.stderr, flush=True)
        with writing(folder, METRICS), replacing(path) as temporary:
            temporary.write_bytes(kept)
    return [json.loads(line) for line in metrics.splitlines()]


def lines_of(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of ``metrics.jsonl``: one line for each epoch."""
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in metrics)


def finish(
    folder: Path, local: LocalModel, recipe: Recipe, write: Callable[[nn.Module, Path, str], None] | None = None
) -> None:
    """Write the results of a finished run: the heads, if there are any, ``config.json``, and then the model.

    Args:
        folder: of the run.
        local: the trained model; it may be without data if ``write`` has them.
        recipe: what it was made by.
        write: writes the state of a module to a file; default: :func:`write_state`.

    Raises:
        ModelError: see :func:`write_state`.
        MissingError: they cannot be written.
    """
    with writing(folder, "the trained weights"):
        write = write or write_state
        if local.heads.state_dict():
            write(local.heads, folder / HEADS, "")
        text = pretrained_cfg.dump(pretrained_cfg.config(recipe))
        with replacing(folder / CONFIG) as path:
            path.write_text(text, encoding="ascii")
        write(local.export(), folder / BACKBONE, text)


@contextmanager
def writing(folder: Path, what: str) -> Iterator[None]:
    """Turn a failure to write ``what`` to a run folder into an error that says how to resume the run.

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


def write_state(model: nn.Module, path: Path, config: str = "") -> None:
    """Write the state dict of ``model`` atomically, as tensors on the CPU, with all keys so that it loads strictly.

    Tensors that share memory (tied weights) are written once for each of their keys.

    Args:
        model: the user's model, or its heads.
        path: the file; its name ends in ``.safetensors``, or in ``.pt`` or ``.pth`` for ``torch.save``.
        config: text of ``config.json``, for the metadata of a safetensors file.

    Raises:
        ModelError: a value of the state dict is not a tensor, which safetensors cannot store.
    """
    state = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in tensors_of(model).items()
    }
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            temporary.touch()
            mode = temporary.stat().st_mode
            safetensors.torch.save_file(state, temporary, metadata=_metadata(config))
            _sort_metadata(temporary)
            temporary.chmod(mode)  # the usual mode of new files; save_file would let nobody else read it
        else:
            torch.save(state, temporary)


def _metadata(config: str) -> dict[str, str]:
    return pretrained_cfg.metadata(config) if config else {"format": "pt"}


def write_in_pieces(
    model: nn.Module, path: Path, config: str, read: Callable[[Sequence[str]], Mapping[str, Tensor]]
) -> None:
    """Write the file that :func:`write_state` writes, of a model that no process holds as a whole.

    At most :data:`PIECE` bytes, or one tensor, are held at a time.

    Args:
        model: its state gives the keys, types and shapes; it may have no data.
        path: the file; its name ends in ``.safetensors``.
        config: text of ``config.json``, for the metadata of the file.
        read: returns the tensors of some keys.

    Raises:
        ModelError: a value of the state dict is not a tensor.
    """
    state = tensors_of(model)
    small = {key: torch.zeros(1, dtype=value.dtype) for key, value in state.items()}  # tells the order of the tensors
    text = safetensors.torch.save(small, metadata=_metadata(config))
    header = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    order = sorted(state, key=lambda key: header[key]["data_offsets"])
    end = 0
    for key in order:
        start, end = end, end + state[key].nbytes
        header[key] |= {"shape": list(state[key].shape), "data_offsets": [start, end]}
    told = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    told = told.ljust(-(-len(told) // 8) * 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for keys in _pieces(order, state):
            values = read(keys)
            for key in keys:
                file.write(values[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _pieces(order: Sequence[str], state: Mapping[str, Tensor]) -> Iterator[list[str]]:
    piece: list[str] = []
    held = 0
    for key in order:
        if piece and held + state[key].nbytes > PIECE:
            yield piece
            piece, held = [], 0
        piece.append(key)
        held += state[key].nbytes
    yield piece


def _sort_metadata(path: Path) -> None:
    """Give the metadata of a safetensors file a fixed order, so that the same state gives the same bytes.

    The format: 8 bytes with the length of the header, the header (JSON, filled up with spaces), the tensors.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the order alone differs"
        file.seek(8)
        file.write(text.ljust(length))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of ``model``.

    Raises:
        ModelError: a value of it is not a tensor.
    """
    state = model.state_dict()
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"the model's state contains something that is not a tensor: {key}.",
                facts=f"it is a {type(value).__name__}; safetensors files can contain only tensors.",
            )
    return state


def export(run: str | Path, output: str | Path, *, force: bool = False, trust_code: bool = False) -> Path:
    """Write the trained model of a run to a file of its own, with only the original keys.

    The weights are first loaded, strictly, into a new model of the same name, and that model's state is written.
    ``config.json`` next to the file describes the preprocessing; a safetensors file also has it in its metadata.

    Args:
        run: the folder of a finished run.
        output: file to write; its ending, ``.safetensors``, ``.pt`` or ``.pth``, gives the format. Its folder is made.
        force: replace ``output`` and ``config.json`` if they exist.
        trust_code: run the code file that the run names, see :mod:`localize.recipes.trust`.

    Returns:
        The file that was written.

    Raises:
        OptionError: the file has a different ending.
        MissingError: ``run`` is not the folder of a finished run, its weights do not match its model, or ``output``
            exists or leads elsewhere through a link.
        UntrustedCodeError: see :func:`recipe_of`.
    """
    folder, path = Path(run), Path(output)
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise OptionError(
            f"{output} does not say which format to write.",
            facts="endings are .safetensors, .pt and .pth.",
            help=f"-o {path.with_suffix('.safetensors')}",
        )
    refuse_leading_out(path)
    if path.exists() and not force:
        raise MissingError(f"{output} exists.", help="choose another name, or --force to replace it")
    model = restore(folder, trust_code=trust_code)
    recipe = recipe_of(folder, trust_code=trust_code)
    text = pretrained_cfg.dump(pretrained_cfg.config(fed(folder, recipe)))
    beside = path.with_name(pretrained_cfg.CONFIG)
    if not force and beside.exists() and beside.read_bytes() != text.encode():
        raise MissingError(
            f"{beside} exists, and describes another model.",
            facts=f"it has to describe {path.name}.",
            help=f"-o in another folder, such as {path.parent / path.stem / path.name}; or --force to replace it",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_state(model, path, text)
        with replacing(beside) as temporary:
            temporary.write_text(text, encoding="ascii")
    except OSError as error:
        raise MissingError(f"{output} cannot be written.", facts=str(error)) from error
    return path


def refuse_leading_out(path: Path) -> None:
    """Refuse a file name that is a link, or whose folder leads out of this directory through a link.

    Raises:
        MissingError: it is a link, or leads out.
    """
    if path.is_symlink():
        raise MissingError(
            f"{path} is a link to {os.readlink(path)}.",
            facts="nothing is written through links.",
            help="choose another -o",
        )
    if path.is_absolute() or ".." in path.parts:
        return
    here, real = Path.cwd().resolve(), path.parent.resolve()
    if not real.is_relative_to(here):
        raise MissingError(
            f"{path.parent} leads through a link to {real}.",
            facts="files with relative names are only written below the current directory.",
            help=f"-o {real / path.name}",
        )


def fed(folder: Path, recipe: Recipe) -> Recipe:
    """Return the recipe of a run, after checking that it describes preprocessing and data.

    Raises:
        MissingError: it does not, because an earlier version wrote it.
    """
    if recipe.preprocessing is None or recipe.dataset is None:
        raise MissingError(
            f"{folder / recipes.FILE_NAME} does not describe the input of the model.",
            facts="it has no preprocessing and dataset, which localize train writes when a run starts.",
            help=f"localize train --recipe {folder} --output NEW",
        )
    return recipe


def recipe_of(folder: Path, *, trust_code: bool = False) -> Recipe:
    """Return the recipe of a run, finished or not.

    Raises:
        MissingError: the folder is not that of a run.
        RecipeError: its recipe cannot be read.
        UntrustedCodeError: it names a code file, see :mod:`localize.recipes.trust`.
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
        raise MissingError(f"{path} is not the recipe of a run.", facts="it does not name a model.")
    trust.refuse_untrusted(folder, recipe, trust_code=trust_code)
    return recipe


def listing_of(folder: Path) -> Listing | None:
    """Return the files that a run was started with; None if the listing cannot be read."""
    return fingerprint.read(folder / fingerprint.FILE_NAME)


def config_of(recipe: Recipe) -> TrainConfig:
    """Return the settings in the recipe of a run."""
    assert recipe.model is not None, "it is that of a run"
    return TrainConfig(recipe.model, recipe=recipe, input_shape=recipe.input_shape, **recipe.train)


def verify(run: str | Path, path: str | Path, *, trust_code: bool = False) -> str:
    """Load an exported file into a fresh model, and compare it with the run's model, bit for bit.

    All tensors of their states are compared, and their outputs in eval mode on the same random images.

    Args:
        run: the folder of a finished run.
        path: the file, as :func:`export` writes it.
        trust_code: run the code file that the run names, see :mod:`localize.recipes.trust`.

    Returns:
        One line about what was compared.

    Raises:
        ExportError: the file does not load strictly, or a tensor or an output differs.
        MissingError: ``run`` is not the folder of a finished run.
    """
    trained = restore(Path(run), trust_code=trust_code)
    recipe = recipe_of(Path(run), trust_code=trust_code)
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
            f"{path} does not contain the weights of {run}.",
            facts=f"{len(changed)} tensors differ: {', '.join(changed[:3])}",
            help=help,
        )
    assert recipe.model is not None, "it is the recipe of a run"
    shape = input_shape_of(resolve(recipe.model), fresh, recipe.input_shape)
    like = next(fresh.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(VERIFIED_IMAGES, *shape, generator=generator).to(like.dtype)
    ours, theirs = _outputs(trained, x), _outputs(fresh, x)
    if not all(_same_bits(one, two) for one, two in zip(ours, theirs, strict=True)):
        largest = max(float((one.double() - two.double()).abs().max()) for one, two in zip(ours, theirs, strict=True))
        raise ExportError(
            f"{path} does not reproduce the model of {run}.",
            facts=[
                f"on {len(x)} random images the outputs differ by up to {largest:.3g} in eval mode.",
                "their weights are equal, so the model uses something that is not in its state dict.",
            ],
            help="in the model, use register_buffer (persistent) for every tensor that is not a parameter",
        )
    return (
        f"verified: a fresh {recipe.model} loads the file strictly; its {len(state)} tensors, and its logits on "
        f"{len(x)} random images, equal those of the run bit for bit"
    )


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True)


def _outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return all output tensors of a model in eval mode."""
    with torch.no_grad():
        return [value for value in tree_leaves(model.eval()(x)) if isinstance(value, Tensor)]


def _same_bits(one: Tensor, two: Tensor) -> bool:
    same = one.shape == two.shape and one.dtype == two.dtype
    return same and torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))


def restore(folder: Path, *, trust_code: bool = False) -> nn.Module:
    """Build the model of a finished run and load its exported weights strictly.

    Raises:
        MissingError: the folder is not that of a finished run, or the weights do not match its model.
        RecipeError: its recipe cannot be read.
        UntrustedCodeError: see :func:`recipe_of`.
    """
    recipe, weights = recipe_of(folder, trust_code=trust_code), folder / BACKBONE
    if not weights.is_file():
        raise MissingError(
            f"the run in {folder} has not finished.",
            facts=f"it has no {BACKBONE}, which is written at the end.",
            help=f"localize train --resume {folder}",
        )
    model = build.create_model(recipe)
    try:
        model.load_state_dict(safetensors.torch.load_file(weights), strict=True)
    except (RuntimeError, OSError, safetensors.SafetensorError) as error:
        facts = str(error).splitlines()[:4]
        raise MissingError(f"{weights} does not contain the weights of {recipe.model}.", facts=facts) from error
    refuse_nan(weights, model.state_dict())
    return model


def refuse_nan(path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse weights that contain NaN.

    Raises:
        MissingError: they do.
    """
    bad = [key for key, value in state.items() if value.is_floating_point() and value.isnan().any()]
    if bad:
        raise MissingError(
            f"{path} contains NaN.",
            facts=f"{len(bad)} of {len(state)} tensors do: {', '.join(bad[:3])}.",
            help="use weights from before training diverged",
        )


def load(folder: Path, *, heads: bool = True, trust_code: bool = False) -> tuple[LocalModel, Recipe]:
    """Return the trained local model of a run, and the run's recipe.

    Args:
        folder: the folder of a finished run.
        heads: whether heads are needed. If not, their weights may be missing (they are then fresh), unless the model
            predicts with them.
        trust_code: run the code file that the run names, see :mod:`localize.recipes.trust`.

    Raises:
        MissingError: see :func:`restore`; or the heads' weights are missing, or belong to other heads.
        LocalizeError: the recipe cannot be carried out.
    """
    model = restore(folder, trust_code=trust_code)
    recipe = recipe_of(folder, trust_code=trust_code)
    assert recipe.model is not None, "it is the recipe of a run"
    source = resolve(recipe.model)
    shape = input_shape_of(source, model, recipe.input_shape)
    like = next(model.parameters())
    local = transform(model, recipe, example_input=torch.zeros(2, *shape, dtype=like.dtype), name=source.name)
    path = folder / HEADS
    heads = heads or not local.plan.outputs or local.plan.answer != "output"
    if local.heads.state_dict() and (heads or path.is_file()):
        if not path.is_file():
            raise MissingError(
                f"the run in {folder} has no heads, but local losses predict with theirs.",
                facts=f"it has no {HEADS}, which is written at the end.",
                help="localize train again; or localize eval without options, to test the model itself",
            )
        try:
            local.heads.load_state_dict(safetensors.torch.load_file(path), strict=True)
        except (RuntimeError, OSError, safetensors.SafetensorError) as error:
            facts = str(error).splitlines()[:4]
            raise MissingError(f"{path} does not contain the weights of these heads.", facts=facts) from error
        refuse_nan(path, local.heads.state_dict())
    return local, recipe


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not _contents(folder))


def _contents(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if child.name != LOCK)
