"""What a training run is asked to do: one frozen object, checked when it is made.

The fields that carry ``help`` are the options of ``localize train`` and the keys of a recipe's training section; their
names are those of timm's training script.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from localize import outside
from localize.errors import OptionError, did_you_mean

if TYPE_CHECKING:
    from localize.ir import CutSpec


def setting(
    default: Any,
    help: str,
    *,
    type: type | None = None,
    of: type | None = None,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    above: float | None = None,
    own: bool = False,
) -> Any:
    """Declare a setting: a dataclass field with its meaning, type, choices, and lowest value (or what it is above).

    A setting whose default is None may be left out; ``type`` then says what it is otherwise. ``of`` is the type of the
    items of a tuple, each of which ``low`` and ``above`` hold for. ``own``: beside ``choices``, a value may name code
    of the user's, ``FILE.py:NAME`` or ``module:NAME``.
    """
    kind = type or default.__class__
    metadata = {
        "help": help, "type": kind, "of": of or kind, "choices": choices, "low": low, "above": above, "own": own
    }  # fmt: skip
    return field(default=default, metadata=metadata)


AUGMENTATIONS = ("none", "flip", "crop2", "crop2-flip", "crop4", "crop4-flip", "crop4-reflect-flip", "imagenet", "timm")
"""What ``augment`` can be; :mod:`localize.train.data.transforms` says what each does."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run: which model by which method on which data, and how.

    ``model`` is a name for :func:`localize.zoo.create_model`, and ``input_shape`` one image (C, H, W) where it is not
    to be what that model was made for. ``recipe``, ``options`` and ``cut`` are handed to :func:`localize.transform` as
    they are.

    Raises:
        OptionError: a value of the wrong type, not among the choices, or out of range.
    """

    model: str
    recipe: Any = "backprop"
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    cut: CutSpec | None = None
    input_shape: tuple[int, ...] | None = None

    data: str = setting(
        "digits", "data set by name, a folder of images with a folder for each class, or FILE.py:NAME, module:NAME"
    )
    data_dir: str | None = setting(None, "folder of a data set that is not bundled", type=str)
    split: float | None = setting(
        None,
        "share of every class to test on, drawn by --seed, where a folder has no test images of its own",
        type=float,
        above=0,
    )
    skip_damaged: bool = setting(False, "leave out image files that cannot be used, instead of refusing them")
    hash_files: bool = setting(False, "let the run remember the contents of its image files, also of more than 64 MiB")
    download: bool = setting(False, "fetch what is not in the folder, for the data sets that torchvision can fetch")
    augment: str | None = setting(
        None,
        "what training images go through: N pixels of padding, black or reflected, and a crop (cropN), a flip, or the "
        "random resized crop and flip of ImageNet, where tests look at the centre; default none, and imagenet for "
        "imagenet; timm is its create_transform, timm:POLICY with auto_augment; or a transform of your own, "
        "FILE.py:NAME",
        type=str,
        choices=AUGMENTATIONS,
        own=True,
    )
    pixel_mean: tuple[float, ...] | None = setting(
        None,
        "mean of the pixels (0..1), one number or one for each channel; default: that of the weights that training "
        "begins with, else measured on the training images",
        type=tuple,
        of=float,
    )
    pixel_std: tuple[float, ...] | None = setting(
        None, "standard deviation of the pixels, as --pixel-mean", type=tuple, of=float, above=0
    )
    mixup: float = setting(0.0, "alpha of timm's mixup, which mixes images and labels in pairs; 0: none", low=0)
    cutmix: float = setting(0.0, "alpha of timm's CutMix; with --mixup too, each batch is mixed by one of them", low=0)
    epochs: int = setting(10, "passes over the training images", low=1)
    max_steps: int | None = setting(None, "stop after this many optimizer steps", type=int, low=1)
    batch_size: int = setting(64, "images per batch", low=1)
    opt: str = setting(
        "sgd", "optimizer by its name in timm (sgd is with Nesterov momentum), or FILE.py:NAME, module:NAME"
    )
    lr: float = setting(0.05, "learning rate after warm-up", above=0)
    momentum: float = setting(0.9, "momentum, for optimizers that have one", low=0)
    weight_decay: float = setting(1e-4, "weight decay, on every trainable parameter", low=0)
    sched: str = setting(
        "cosine",
        "learning rate over the epochs, set once per epoch: timm's cosine, the cosine that ends with 0 in the last "
        "epoch (full-cosine: the papers' CIFAR code), timm's tanh and poly, steps at --milestones, or constant; none "
        "is without warm-up; or a function of your own, FILE.py:NAME",
        choices=("cosine", "full-cosine", "multistep", "tanh", "poly", "constant", "none"),
        own=True,
    )
    milestones: tuple[int, ...] | None = setting(
        None,
        "epochs after which multistep multiplies the learning rate by --gamma, such as 200,300",
        type=tuple,
        of=int,
    )
    gamma: float = setting(0.1, "what multistep multiplies the learning rate by", above=0)
    warmup_epochs: int = setting(0, "epochs of linear warm-up, counted in --epochs", low=0)
    warmup_lr: float | None = setting(
        None, "learning rate of the first epoch of a warm-up; default 1e-5, and 0.01 for full-cosine", type=float, low=0
    )
    stage_epochs: int | None = setting(
        None,
        "train one segment at a time: the first for this many epochs, then the second, ..., with --sched and its "
        "warm-up in each; --epochs is the sum",
        type=int,
        low=1,
    )
    freeze_after: tuple[str, ...] | None = setting(
        None,
        "blocks to freeze, and the epoch after which: segment_0:30,segment_1:60,head_2:60; * stands for anything",
        type=tuple,
        of=str,
    )
    seed: int = setting(0, "seed of the weights, the data order and everything else random", low=0)
    pretrained: bool = setting(False, "begin with the weights that the model's library has published")
    initial_checkpoint: str | None = setting(
        None,
        "begin with the weights in this file: a state dict of the plain model, .safetensors, .pt or .pth",
        type=str,
    )
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto (cuda where there is one)")
    workers: int = setting(0, "processes that decode images of folders; 0 decodes in this one", low=0)
    output: str | None = setting(None, "run folder; default runs/MODEL-METHOD-DATA-seedN", type=str)

    clip_grad: float | None = setting(
        None,
        "scale gradients down to this norm: that of all parameters, or, where a step updates after each segment, of "
        "what each loss trains",
        type=float,
        above=0,
    )
    amp: bool = setting(False, "train under autocast to --amp-dtype; weights and tests stay in float32")
    amp_dtype: str = setting(
        "bfloat16",
        "type of --amp; float16 trains with one gradient scaler over all local losses",
        choices=("bfloat16", "float16"),
    )
    grad_accum_steps: int = setting(1, "batches whose gradients are averaged into one optimizer step", low=1)
    sync_bn: bool = setting(False, "let every BatchNorm see the parts of the batch of all processes, on CUDA")
    channels_last: bool = setting(False, "keep images and convolutions in the memory format channels_last")
    compile: bool = setting(False, "compile every segment's forward, loss and backward by Inductor")
    model_ema: bool = setting(False, "average the weights over the steps; the model and its average are both tested")
    model_ema_decay: float = setting(0.9998, "largest share of the average that a step of --model-ema keeps", above=0)
    model_ema_warmup: bool = setting(
        True, "let that share begin at 0 and rise with the steps as in timm: 1 - (1 + step) ** (-2 / 3)"
    )
    model_ema_export: str = setting(
        "better",
        "what --model-ema exports: the average, the weights themselves, or the one of higher test accuracy in the last "
        "epoch",
        choices=("better", "average", "weights"),
    )
    checkpoint_every: int | None = setting(
        None, "optimizer steps between checkpoints, beside the one at the end of every epoch", type=int, low=1
    )

    timeout: float = setting(
        120.0, "of several processes: seconds after which one that does not answer ends the run", above=0
    )

    parallel: str = setting(
        "data",
        "what several processes share: each batch (data), or the segments, which hand batches on to each other (pipe)",
        choices=("data", "pipe"),
    )
    stages: tuple[int, ...] | None = setting(
        None,
        "of --parallel pipe: number of the first loss of each process, such as 0,4,7; default: as balances their times",
        type=tuple,
        of=int,
        low=0,
    )

    callback: str | None = setting(
        None, "what is called after every step and epoch, and after the run: FILE.py:NAME, module:NAME", type=str
    )
    log_tensorboard: bool = setting(False, "write the numbers of every epoch for TensorBoard too, in the run folder")
    log_wandb: bool = setting(False, "send the numbers of every epoch to Weights & Biases too, by the folder's name")

    def __post_init__(self) -> None:
        for item in settings():
            if isinstance(getattr(self, item.name), list):
                object.__setattr__(self, item.name, tuple(getattr(self, item.name)))
            _check(item, getattr(self, item.name))
        if not isinstance(self.model, str) or not self.model:
            raise OptionError(f"a model's name cannot be {self.model!r}.", help="localize models", option="model")
        if self.warmup_epochs >= self.span and self.warmup_epochs:
            counted = "--epochs" if self.stage_epochs is None else "--stage-epochs"
            raise OptionError(
                f"{self.warmup_epochs} epochs of warm-up leave nothing of {self.span} epochs.",
                facts=f"warm-up is counted in {counted}.",
                help=f"--warmup-epochs 0 to {self.span - 1}, or more {counted}",
                option="warmup_epochs",
            )
        if self.warmup_epochs and self.sched == "none":
            raise OptionError(
                "sched 'none' never changes the learning rate, so there is no warm-up.",
                facts=f"warmup_epochs is {self.warmup_epochs}.",
                help="--sched constant, or --warmup-epochs 0",
                option="warmup_epochs",
            )
        if self.sched == "full-cosine" and self.span == 1:
            counted = "--epochs" if self.stage_epochs is None else "--stage-epochs"
            raise OptionError(
                "sched 'full-cosine' trains its last epoch with learning rate 0, and there is only one.",
                help=f"{counted} 2 or more, or --sched cosine",
                option="sched",
            )
        if self.pretrained and self.initial_checkpoint is not None:
            raise OptionError(
                "--pretrained and --initial-checkpoint were both given.",
                facts=f"weights begin as published, or as in {self.initial_checkpoint}.",
                help="one of them",
                option="initial_checkpoint",
            )
        if self.split is not None and self.split >= 1:
            raise OptionError(
                f"split cannot be {self.split}.",
                facts="it is the share of the images that are tested on, and must be below 1.",
                help="--split 0.2",
            )
        if self.amp_dtype == "float16" and not self.amp:
            raise OptionError(
                "amp_dtype 'float16' is the type of autocast, which is off.",
                help="--amp --amp-dtype float16",
                option="amp_dtype",
            )
        if self.stages is not None and self.parallel != "pipe":
            raise OptionError(
                "--stages says what each process of a pipeline trains.",
                facts=f"parallel is {self.parallel!r}: every process trains all.",
                help="--parallel pipe, or leave out --stages",
                option="stages",
            )
        self._check_milestones()
        self._check_stages()
        if self.model_ema_decay >= 1:
            raise OptionError(
                f"model_ema_decay cannot be {self.model_ema_decay}.",
                facts="it is the share of the average that a step keeps, and must be below 1.",
                help="--model-ema-decay 0.9998",
                option="model_ema_decay",
            )

    def _check_milestones(self) -> None:
        """Refuse steps without milestones, and milestones that are not ascending numbers of epochs."""
        milestones = self.milestones
        if self.sched == "multistep" and not milestones:
            raise OptionError(
                "sched 'multistep' needs milestones.",
                facts="they are the epochs after which the learning rate falls.",
                help="--milestones 200,300",
                option="sched",
            )
        if milestones is None:
            return
        whole = all(isinstance(one, int) and not isinstance(one, bool) and one > 0 for one in milestones)
        if not (milestones and whole) or list(milestones) != sorted(set(milestones)):
            raise OptionError(
                f"milestones cannot be {','.join(map(str, milestones)) or 'empty'}.",
                facts="they are numbers of epochs, from 1, each larger than the one before it.",
                help="--milestones 200,300",
                option="milestones",
            )

    def _check_stages(self) -> None:
        """Refuse blocks to freeze without an epoch, or with one that never comes, and two schedules at once."""
        if self.freeze_after is None:
            return
        if self.stage_epochs is not None:
            raise OptionError(
                "--stage-epochs and --freeze-after were both given.",
                facts="--stage-epochs freezes all segments but one.",
                help="one of them",
                option="freeze_after",
            )
        for name, last in epochs_by_block(self.freeze_after).items():
            if last >= self.epochs:
                raise OptionError(
                    f"{name} would be frozen after epoch {last}, and the run has {self.epochs}.",
                    help=f"--freeze-after {name}:{max(self.epochs - 1, 1)} at the latest, or more --epochs",
                    option="freeze_after",
                )

    @property
    def span(self) -> int:
        """Number of epochs over which ``sched`` runs: all, or those of one stage."""
        return self.epochs if self.stage_epochs is None else self.stage_epochs

    @property
    def scales(self) -> bool:
        """Whether training needs a gradient scaler."""
        return self.amp and self.amp_dtype == "float16"

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed, and their labels soft."""
        return self.mixup > 0 or self.cutmix > 0

    def training(self) -> dict[str, Any]:
        """Return the settings by name, without model and method."""
        return {item.name: getattr(self, item.name) for item in settings()}


def epochs_by_block(freeze_after: tuple[str, ...] | None) -> dict[str, int]:
    """Return what ``freeze_after`` says: by the name of a block, the last epoch that trains it.

    Raises:
        OptionError: an item is not NAME:EPOCH, or a name stands there twice.
    """
    found: dict[str, int] = {}
    for text in freeze_after or ():
        name, _, last = text.strip().rpartition(":")
        if not name or not last.isdecimal() or int(last) < 1 or name in found:
            raise OptionError(
                f"freeze_after cannot be {','.join(freeze_after or ())}.",
                facts="it is names of blocks, each once, with the epoch after which it is frozen, from 1 on.",
                help="--freeze-after segment_0:30,segment_1:60",
                option="freeze_after",
            )
        found[name] = int(last)
    return found


def settings() -> tuple[dataclasses.Field[Any], ...]:
    """Return the fields of :class:`TrainConfig` that are training settings, in order."""
    return tuple(item for item in dataclasses.fields(TrainConfig) if "help" in item.metadata)


def check_names(names: Iterable[str]) -> None:
    """Refuse names that are not settings, such as the keys of a recipe's training section.

    Raises:
        OptionError: one of ``names`` is not a setting.
    """
    known = [item.name for item in settings()]
    for name in names:
        if name not in known:
            raise OptionError(
                f"there is no training setting {name!r}.",
                facts=f"settings are {', '.join(known)}.",
                help=did_you_mean(str(name), known) or "localize train --help",
                option=name,
            )


_KINDS: Mapping[type, str] = MappingProxyType(
    {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
)
_LISTS: Mapping[type, str] = MappingProxyType(
    {int: "a list of whole numbers", float: "a list of numbers", str: "a list of words"}
)


def _check(item: dataclasses.Field[Any], value: Any) -> None:
    flag = "--" + item.name.replace("_", "-")
    about = item.metadata
    if value is None and item.default is None:
        return
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else repr(value)
    help = f"leave out {flag}" if item.default is None or item.default is False else f"{flag} {item.default}"
    items = value if isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) != (about["type"] is tuple) or not all(_is(one, about["of"]) for one in items):
        kind = _LISTS[about["of"]] if about["type"] is tuple else _KINDS[about["of"]]
        raise OptionError(
            f"{item.name} cannot be {shown}.",
            facts=f"{flag}: {about['help']}; it must be {kind}.",
            help=help,
            option=item.name,
        )
    choices, low, above = about["choices"], about["low"], about["above"]
    own = about["own"] and isinstance(value, str) and (outside.is_spelled(value) or value.startswith("timm:"))
    if choices and value not in choices and not own:
        raise OptionError(
            f"{item.name} cannot be {shown}.",
            facts=f"its values are {', '.join(choices)}{', or FILE.py:NAME, module:NAME' if about['own'] else ''}.",
            help=did_you_mean(value, choices) or help,
            option=item.name,
        )
    if any((low is not None and one < low) or (above is not None and one <= above) for one in items):
        limit = f"at least {low:g}" if low is not None else f"above {above:g}"
        raise OptionError(
            f"{item.name} cannot be {shown}.",
            facts=f"{flag}: {about['help']}; it must be {limit}.",
            help=help,
            option=item.name,
        )


def _is(value: Any, kind: type) -> bool:
    """Whether a value is of a kind: whole numbers are numbers too, truth values and infinities are not."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)
