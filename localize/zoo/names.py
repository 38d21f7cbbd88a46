"""Model names: which library a name comes from, what goes in, what comes out, and how the model is built.

A name is ``cifar/NAME`` (this package), ``tv/NAME`` (torchvision: classification, video, segmentation, detection),
``timm/NAME`` (timm, with or without a weights tag), or ``FILE.py:FACTORY`` (a function or class of the user's). A bare
``NAME`` is taken where exactly one library has it. torchvision's quantized models, which are not trained, and its
models of optical flow, which give no class scores, have no name here.

torch, torchvision and timm are imported when a name needs them, not before: importing this module takes no time.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, Literal

from localize import outside
from localize.errors import Advice, LocalizeError, MissingError, ModelError, OptionError, UnknownNameError, did_you_mean

if TYPE_CHECKING:
    from torch import nn
    from torchvision.models import WeightsEnum

Shape = tuple[int, ...]
Task = Literal["classification", "video", "segmentation", "detection"]
Begin = Literal["published", "net"] | None
"""A model with published weights; the net that these are for, with fresh ones; or (None) the net without them."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from and what it was made for."""

    name: str
    """Canonical name, such as ``cifar/resnet110``; it resolves to itself."""

    source: Literal["cifar", "tv", "timm", "file"]

    input_shape: Shape | None
    """``(C, H, W)`` of one image, ``(C, T, H, W)`` of one video. None: a file that does not say; see
    :func:`input_shape_of`."""

    num_classes: int | None
    """Width of the logits that :func:`create_model` builds unless told otherwise. None: a file that does not say."""

    task: Task = "classification"
    """What the model tells apart: images, videos, or pixels (segmentation); of a detection model it is its backbone
    with a classifier, see :mod:`localize.zoo.detection`."""


@dataclass(frozen=True)
class _CifarNet:
    module: str
    factory: str
    input_shape: Shape = (3, 32, 32)
    num_classes: int = 10


_CIFAR_NETS: Mapping[str, _CifarNet] = MappingProxyType(
    {
        "resnet20": _CifarNet("cifar_resnet", "resnet20"),
        "resnet32": _CifarNet("cifar_resnet", "resnet32"),
        "resnet32_w": _CifarNet("cifar_resnet", "resnet32_w"),
        "resnet44": _CifarNet("cifar_resnet", "resnet44"),
        "resnet56": _CifarNet("cifar_resnet", "resnet56"),
        "resnet110": _CifarNet("cifar_resnet", "resnet110"),
        "resnet1202": _CifarNet("cifar_resnet", "resnet1202"),
        "vgg8b": _CifarNet("vgg", "vgg8b"),
        "vgg8b_cifar100": _CifarNet("vgg", "vgg8b", num_classes=100),
        "vgg8b_mnist": _CifarNet("vgg", "vgg8b", (1, 28, 28)),
        "vgg8b_stl10": _CifarNet("vgg", "vgg8b", (3, 96, 96)),
        "vgg19": _CifarNet("vgg", "vgg19"),
        "fc_mnist": _CifarNet("dcl_nets", "fc_mnist", (1, 28, 28)),
        "fc_cifar10": _CifarNet("dcl_nets", "fc_cifar10"),
        "fc_cifar100": _CifarNet("dcl_nets", "fc_cifar100", num_classes=100),
        "conv256": _CifarNet("dcl_nets", "conv256"),
        "conv256_cifar100": _CifarNet("dcl_nets", "conv256", num_classes=100),
        "conv256_mnist": _CifarNet("dcl_nets", "conv256", (1, 28, 28)),
        "conv512": _CifarNet("dcl_nets", "conv512"),
        "conv512_cifar100": _CifarNet("dcl_nets", "conv512", num_classes=100),
        "conv512_mnist": _CifarNet("dcl_nets", "conv512", (1, 28, 28)),
        "vit": _CifarNet("tokens", "vit"),
        "mixer": _CifarNet("tokens", "mixer"),
    }
)

_TV_CLASSES = 1000

# torchvision warns unless these are told to keep the initialisation that they have by default.
_TV_INIT = frozenset({"googlenet", "inception_v3"})

_TV_PUBLISHED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "googlenet": {"transform_input": True, "aux_logits": False},
        "inception_v3": {"transform_input": True},
        **dict.fromkeys(("fcn_resnet50", "fcn_resnet101"), {"aux_loss": True}),
        **dict.fromkeys(
            ("deeplabv3_resnet50", "deeplabv3_resnet101", "deeplabv3_mobilenet_v3_large"), {"aux_loss": True}
        ),
    }
)
"""Options with which torchvision builds another net when it is asked for published weights."""

_TIMM_PUBLISHED: Mapping[str, Mapping[str, Any]] = MappingProxyType({"fbnetc_100": {"bn_eps": 1e-3}})
"""The same of timm."""

# 145 names of timm are published without a classifier. A local loss needs classes, so these get ImageNet's.
_TIMM_CLASSES = 1000

_NOT_PRETRAINED = Advice("leave out pretrained=True", "leave out --pretrained")


LARGEST_IMAGE = 2**31 - 1
"""Number of values of the largest image that is taken: torch's convolutions and poolings count them in 32 bits."""


def resolve(name: str) -> ModelSource:
    """Find the model that a name means, without building it.

    Args:
        name: ``cifar/NAME``, ``tv/NAME``, ``timm/NAME``, ``FILE.py:FACTORY``, or a bare name that one library has.

    Returns:
        The canonical name, its source, and the input and the number of classes it was made for.

        - ``tv/``: the smallest crop that one of the model's published weights is evaluated at (224 for most), 1000
          classes. Video: 16 frames of that crop, 400 classes; segmentation: 520x520, 21 classes; backbones of
          detection: 320x320, 1000 classes.
        - ``timm/``: what timm's configuration of the name says; 1000 classes where timm says 0 (feature extractors).
        - a file: the factory's attributes ``input_shape`` and ``num_classes``, or the default of its argument
          ``num_classes``. The file is imported.

    Raises:
        UnknownNameError: no library, file or factory of that name, or a bare name that several libraries have.
        ModelError: the user's file could not be imported, or names something that cannot be called; or it is a model
            of torchvision that gives no class scores.
        MissingError: torchvision or timm is not installed.

    Example:
        >>> resolve("resnet110").name
        'cifar/resnet110'
    """
    if _is_file(name):
        return _resolve_file(name)
    library, slash, bare = name.partition("/")
    if not slash:
        return _resolve_bare(name)
    if library not in _LIBRARIES:
        raise UnknownNameError(
            f"there is no model library {library!r}.",
            facts="libraries: cifar, tv, timm; a file of your own is written FILE.py:FACTORY",
            help=_models_command(bare),
        )
    found = _LIBRARIES[library].resolve(bare)
    if found is None:
        raise _unknown(name, bare, _LIBRARIES[library].names())
    return found


def create_model(
    name: str,
    num_classes: int | None = None,
    *,
    input_shape: Shape | None = None,
    pretrained: bool = False,
    fetch: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Build a model by name.

    Args:
        name: as in :func:`resolve`.
        num_classes: width of the logits; None: what the model was made for (``resolve(name).num_classes``).
        input_shape: ``(C, H, W)``, of videos ``(C, T, H, W)``; None: what the model was made for. Networks that do not
            depend on the size are built the same for all. torchvision models take 3 channels only.
        pretrained: load the library's published weights (downloaded on first use). A classifier of another number of
            classes is drawn again. Some nets are others with them, as their libraries have it: ``tv/googlenet`` has no
            auxiliary classifiers and, like ``tv/inception_v3``, scales images; torchvision's segmentation models have
            auxiliary classifiers. Backbones of detection models are the same net, and all of it can be trained.
        fetch: False builds that net, and leaves the weights it was drawn with.
        kwargs: options of the model's own constructor, such as ``dropout=0.05`` for ``cifar/vgg8b``.

    Returns:
        The model, in train mode, on the default device.

    Raises:
        UnknownNameError, ModelError, MissingError: as in :func:`resolve`.
        OptionError: the model has no such option, or cannot be built with its value, or it loads or executes something.
        ModelError: the user's factory raised, or returned something that is not an ``nn.Module``.
        MissingError: the weights could not be fetched.
    """
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 0):
        raise OptionError(f"num_classes is {num_classes!r}, not a number of classes.", help="num_classes=10")
    if input_shape is not None:
        input_shape = checked_shape(input_shape)
    source = resolve(name)
    own = source.input_shape
    if input_shape and source.source != "file" and own is not None and len(input_shape) != len(own):
        raise OptionError(
            f"{source.name} takes inputs of {len(own)} dimensions, not {len(input_shape)}.",
            facts=f"without the batch dimension, such as {own}",
            help=f"input_shape={own}",
        )
    if source.source != "file":
        _refuse_loading(source.name, kwargs)
    if num_classes == 0 and source.source != "timm":
        raise OptionError(f"{source.name} cannot have 0 classes.", help="num_classes=10")
    if source.source == "file":
        return _build_file(source, num_classes, input_shape, pretrained and fetch, kwargs)
    begin: Begin = None if not pretrained else "published" if fetch else "net"
    build = _LIBRARIES[source.source].builder(source, num_classes, input_shape, begin, kwargs)
    given = kwargs | {"num_classes": num_classes, "input_shape": input_shape}
    given = {key: value for key, value in given.items() if value is not None}
    return _call(source.name, build, given, begin == "published")


_LOADING = frozenset(
    {
        "cache_dir",
        "custom_load",
        "exportable",
        "model_cfg",
        "no_jit",
        "progress",
        "scriptable",
        "state_dict",
        "trust_remote_code",
        "weights",
        "weights_backbone",
    }
)
"""Options of libraries that load files, fetch or execute, or choose what is."""


def _refuse_loading(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options with which a library would load a file, fetch one, or run what is in it.

    Raises:
        OptionError: there is one.
    """
    for option, value in options.items():
        endings = ("_path", "_file", "_url", "_dir", "_hub_id")
        loads = option in _LOADING or option.startswith(("pretrained", "checkpoint", "hf_hub"))
        if loads or (option.endswith(endings) and isinstance(value, str | Path)):
            raise OptionError(
                f"{name} is not built with the option {option!r}.",
                facts="it makes the library load, fetch or run something, and a recipe can come from anybody.",
                help=Advice(
                    "leave it out; pretrained=True loads published weights",
                    "leave it out; weights are loaded by --pretrained, or --initial-checkpoint FILE",
                ),
            )


def create_empty(name: str, num_classes: int | None = None, **options: Any) -> nn.Module:
    """Build a model by name without data, on the meta device.

    A constructor that reads values of tensors is run, and its data dropped.

    Args:
        name: as in :func:`resolve`.
        num_classes: as in :func:`create_model`.
        options: the other arguments of :func:`create_model`.

    Returns:
        The model, on the meta device.
    """
    import torch

    try:
        with torch.device("meta"):
            return create_model(name, num_classes, **options)
    except Exception:  # the same, if it is no matter of the device, comes again
        return create_model(name, num_classes, **options).to("meta")


def input_shape_of(source: ModelSource, model: nn.Module, given: Shape | None = None) -> Shape:
    """Return the ``(C, H, W)`` to feed a model: the given one, else what its name says, else ``model.input_shape``.

    Args:
        source: from :func:`resolve`.
        model: the model itself.
        given: shape that was asked for.

    Raises:
        OptionError: none of them says.
    """
    shape = given or source.input_shape or getattr(model, "input_shape", None)
    if shape is None:
        raise OptionError(
            f"{source.name} does not say what input it takes.",
            facts="neither its factory nor the model has an attribute input_shape",
            help=Advice(
                "input_shape=(3, 32, 32), or set FACTORY.input_shape = (3, 32, 32) in the file",
                "--input-shape 3,32,32, or set FACTORY.input_shape = (3, 32, 32) in the file",
            ),
        )
    return checked_shape(shape)


def checked_shape(shape: Any) -> Shape:
    """Return the shape of one image or video as a tuple.

    Raises:
        OptionError: it is not two or more whole numbers from 1 on, or the image would be larger than any that is taken.
    """
    sizes = shape if isinstance(shape, (tuple, list)) else ()
    if len(sizes) < 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
        raise OptionError(
            f"input_shape is {shape!r}, not (channels, height, width).",
            facts="without the batch dimension; videos have their frames after the channels",
            help="input_shape=(3, 32, 32)",
            option="input_shape",
        )
    if math.prod(sizes) > LARGEST_IMAGE:
        raise OptionError(
            f"input_shape is {tuple(shape)}: one image would hold {math.prod(sizes):,} values.",
            facts=f"the largest that is taken has {LARGEST_IMAGE:,}.",
            help="input_shape=(3, 32, 32)",
            option="input_shape",
        )
    return tuple(sizes)


def list_models(pattern: str = "*", *, task: Task | None = None) -> list[str]:
    """Return the canonical names that match a shell pattern: first ``cifar/``, then ``tv/``, then ``timm/``.

    Args:
        pattern: ``*``, ``?`` and ``[...]``, matched with the whole name and with the name after the slash:
            ``resnet*`` and ``cifar/*`` both find ``cifar/resnet20``.
        task: only models for it, see :class:`ModelSource`; None: all.

    Raises:
        MissingError: torchvision or timm is not installed.
    """
    prefix, slash, _ = pattern.partition("/")
    libraries = (prefix,) if slash and prefix in _LIBRARIES else tuple(_LIBRARIES)
    return [
        f"{library}/{bare}"
        for library in libraries
        for bare in _LIBRARIES[library].names()
        if fnmatchcase(bare, pattern) or fnmatchcase(f"{library}/{bare}", pattern)
        if task is None or (_tv_task(bare) if library == "tv" else "classification") == task
    ]


def library(name: str) -> str:
    """Return where a canonical name comes from: ``cifar``, ``tv``, ``timm``, or ``file``.

    Args:
        name: canonical, as in ``resolve(name).name``.
    """
    return "file" if _is_file(name) else name.partition("/")[0]


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the mean and std of the channels that the published weights of a model were trained with.

    Args:
        name: canonical.

    Returns:
        Both as shares of the largest pixel value; None where nothing is published, or its library does not say.

    Raises:
        UnknownNameError, MissingError: as in :func:`resolve`.
    """
    source = resolve(name)
    bare = source.name.partition("/")[2]
    if source.source == "timm":
        config = _timm().get_pretrained_cfg(bare)
        return (tuple(config.mean), tuple(config.std)) if config.has_weights else None
    if source.source == "tv" and len(_torchvision_models().get_model_weights(bare)):
        how = _tv_weights(bare, source.task).transforms()
        if hasattr(how, "mean") and hasattr(how, "std"):
            return tuple(how.mean), tuple(how.std)
    return None


def timm_cfg(name: str) -> dict[str, Any]:
    """Return timm's configuration of a model of its own, without what says where weights lie.

    Args:
        name: canonical, such as ``timm/resnet18``.

    Raises:
        MissingError: timm is not installed.
    """
    config = _timm().get_pretrained_cfg(name.removeprefix("timm/"))
    unwanted = (
        "tag",
        "label_offset",
        "test_input_size",
        "test_crop_pct",
        "license",
        "origin_url",
        "notes",
        "custom_load",
    )
    found = config.to_dict(remove_source=True)
    return {key: value for key, value in found.items() if key not in unwanted}


def family(name: str) -> str:
    """Return the file in which a model is defined, without ``.py``: ``densenet``, ``swin_transformer``.

    Args:
        name: canonical, as in ``resolve(name).name``. A file of the user's is not imported.

    Raises:
        UnknownNameError, MissingError: as in :func:`resolve`.
    """
    if _is_file(name):
        return Path(name.partition(".py")[0]).name
    source = resolve(name)
    return _LIBRARIES[source.source].module(source.name.partition("/")[2]).rpartition(".")[2]


def _resolve_bare(name: str) -> ModelSource:
    found = [source for library in _LIBRARIES.values() if (source := library.resolve(name)) is not None]
    if len(found) == 1:
        return found[0]
    if not found:
        raise _unknown(name, name, [bare for library in _LIBRARIES.values() for bare in library.names()])
    *others, last = [source.name for source in found]
    raise UnknownNameError(
        f"model {name!r} is in {'two' if len(found) == 2 else 'three'} libraries.",
        help=f"write {', '.join(others)} or {last}",
    )


def _unknown(name: str, bare: str, choices: list[str]) -> UnknownNameError:
    guess = did_you_mean(bare, choices)
    return UnknownNameError(f"there is no model {name!r}.", facts=guess or (), help=_models_command(bare))


def _models_command(bare: str) -> str:
    stem = re.match(r"[A-Za-z]*", bare)
    return f"localize models '*{stem.group().lower()}*'" if stem and stem.group() else "localize models"


# ---- cifar: this package


def _cifar_names() -> list[str]:
    return list(_CIFAR_NETS)


def _resolve_cifar(bare: str) -> ModelSource | None:
    net = _CIFAR_NETS.get(bare)
    return None if net is None else ModelSource(f"cifar/{bare}", "cifar", net.input_shape, net.num_classes)


def _cifar_builder(
    source: ModelSource, num_classes: int | None, input_shape: Shape | None, begin: Begin, kwargs: dict[str, Any]
) -> Callable[[], nn.Module]:
    net = _CIFAR_NETS[source.name.removeprefix("cifar/")]
    factory = getattr(import_module(f"localize.zoo.{net.module}"), net.factory)
    if begin == "published":
        raise OptionError(f"{source.name} has no published weights.", help=_NOT_PRETRAINED)
    _check_options(source.name, factory, kwargs)
    return partial(factory, num_classes or net.num_classes, input_shape=input_shape or net.input_shape, **kwargs)


def _cifar_module(bare: str) -> str:
    return _CIFAR_NETS[bare].module


# ---- tv: torchvision.models


_TV_TASKS: Mapping[str, Task] = MappingProxyType(
    {"": "classification", "video": "video", "segmentation": "segmentation", "detection": "detection"}
)
"""Modules of ``torchvision.models`` whose names are taken, and what their models do; names are unique among them."""

_TV_FRAMES = 16
_TV_SEGMENTATION = 520
_TV_DETECTION = 320


def _torchvision_models() -> ModuleType:
    return _import("torchvision.models")


def _tv_part(name: str) -> ModuleType:
    models = _torchvision_models()
    return getattr(models, name) if name else models


def _tv_names() -> list[str]:
    return [bare for name in _TV_TASKS for bare in _torchvision_models().list_models(module=_tv_part(name))]


def _tv_task(bare: str) -> Task | None:
    models = _torchvision_models()
    return next((task for name, task in _TV_TASKS.items() if bare in models.list_models(module=_tv_part(name))), None)


def _resolve_tv(bare: str) -> ModelSource | None:
    models, task = _torchvision_models(), _tv_task(bare)
    if task is None:
        if bare in models.list_models():
            part = models.get_model_builder(bare).__module__.removeprefix("torchvision.models.").partition(".")[0]
            raise ModelError(
                f"tv/{bare} is a model of {part}, to which local losses do not apply.",
                facts=f"torchvision's models of {', '.join(_TV_TASKS.values())} are covered.",
                help="localize models 'tv/*'",
            )
        return None
    weights = models.get_model_weights(bare)
    if task in ("classification", "video"):
        size = min(map(_crop, weights), default=224)
        shape = (3, size, size) if task == "classification" else (3, _TV_FRAMES, size, size)
    else:
        size = _TV_SEGMENTATION if task == "segmentation" else _TV_DETECTION
        shape = (3, size, size)
    known = next((len(one.meta["categories"]) for one in weights), _TV_CLASSES)
    classes = known if task in ("video", "segmentation") else _TV_CLASSES
    return ModelSource(f"tv/{bare}", "tv", shape, classes, task)


def _crop(weights: WeightsEnum) -> int:
    return weights.transforms().crop_size[0]


def _tv_builder(
    source: ModelSource, num_classes: int | None, input_shape: Shape | None, begin: Begin, kwargs: dict[str, Any]
) -> Callable[[], nn.Module]:
    bare = source.name.removeprefix("tv/")
    options: dict[str, Any] = {}
    if bare in _TV_INIT:
        options["init_weights"] = True
    if source.task in ("segmentation", "detection"):
        options["weights_backbone"] = None  # torchvision fetches them by default
    if input_shape is not None and input_shape != source.input_shape:
        options |= _tv_size_option(source.name, bare, input_shape)
    classes = num_classes or source.num_classes or _TV_CLASSES
    weights = _tv_weights(bare, source.task) if begin == "published" else None
    get_model = _torchvision_models().get_model
    if source.task == "detection":
        return partial(_tv_backbone, partial(get_model, bare, **options | kwargs), classes, weights)
    if begin is not None:
        options |= _TV_PUBLISHED.get(bare, {})
    if num_classes is not None:
        options["num_classes"] = num_classes
    fresh = partial(get_model, bare, **options | kwargs)
    if weights is None:
        return fresh
    # torchvision reads its own files: some need keys renamed, or hold what the net does not have.
    published = partial(get_model, bare, weights=weights, **kwargs)
    return partial(_tv_with_weights, fresh, published, classes, weights)


def _tv_backbone(detector: Callable[[], nn.Module], classes: int, weights: WeightsEnum | None) -> nn.Module:
    """Build the backbone of a detection model. Its BatchNorms take the statistics of published, frozen ones."""
    model = detector()
    if weights is not None:
        model.load_state_dict(weights.get_state_dict(progress=True, check_hash=True))
    return import_module("localize.zoo.detection").DetectionBackbone(model, classes)


def _tv_with_weights(
    fresh: Callable[[], nn.Module], published: Callable[[], nn.Module], classes: int, weights: WeightsEnum
) -> nn.Module:
    """Build a model with published weights everywhere but in a classifier of another number of classes."""
    model = fresh()
    import_module("localize.zoo.weights").load_state(model, published().state_dict(), classes, told=weights.url)
    return model


def _tv_size_option(name: str, bare: str, input_shape: Shape) -> dict[str, Any]:
    channels, *_, height, width = input_shape
    if channels != 3:
        raise OptionError(
            f"{name} takes images of 3 channels, not {channels}.",
            help="a timm/ or cifar/ model, which take any number of channels",
        )
    if bare.startswith("mvit_"):
        raise OptionError(f"{name} takes 16 frames of 224x224 only.", help="leave input_shape out, or another model")
    if bare.startswith("maxvit_"):
        return {"input_size": (height, width)}
    if not bare.startswith("vit_"):
        return {}
    if height != width:
        raise OptionError(
            f"{name} takes square images, not {height}x{width}.", help=f"input_shape=(3, {height}, {height})"
        )
    return {"image_size": height}


def _tv_weights(bare: str, task: Task | None) -> WeightsEnum:
    # The weights of the size that `resolve` reports, torchvision's default first.
    choices = _torchvision_models().get_model_weights(bare)
    if task in ("segmentation", "detection"):
        return choices.DEFAULT
    size = min(map(_crop, choices))
    return next(weights for weights in (choices.DEFAULT, *choices) if _crop(weights) == size)


def _tv_module(bare: str) -> str:
    return _torchvision_models().get_model_builder(bare).__module__


# ---- timm


def _timm() -> ModuleType:
    return _import("timm")


def _timm_names() -> list[str]:
    return _timm().list_models()


def _resolve_timm(bare: str) -> ModelSource | None:
    timm = _timm()
    if not timm.is_model(bare):
        return None
    try:
        config = timm.get_pretrained_cfg(bare, allow_unregistered=False)
    except RuntimeError as error:  # the architecture exists, the tag after the dot does not
        architecture = bare.partition(".")[0]
        tags = timm.list_pretrained(f"{architecture}.*")
        raise UnknownNameError(
            f"there is no model {f'timm/{bare}'!r}.",
            facts=f"weights of {architecture}: {', '.join(tags) or 'none'}",
            help=f"timm/{architecture}",
        ) from error
    return ModelSource(f"timm/{bare}", "timm", tuple(config.input_size), config.num_classes or _TIMM_CLASSES)


def _timm_builder(
    source: ModelSource, num_classes: int | None, input_shape: Shape | None, begin: Begin, kwargs: dict[str, Any]
) -> Callable[[], nn.Module]:
    timm = _timm()
    bare = source.name.removeprefix("timm/")
    config = timm.get_pretrained_cfg(bare)
    if begin == "published" and not config.has_weights:
        raise OptionError(
            f"{source.name} has no published weights.",
            help=Advice(
                f"{_NOT_PRETRAINED}, or {_models_command(bare)}", f"{_NOT_PRETRAINED.flags}, or {_models_command(bare)}"
            ),
        )
    options = dict(_TIMM_PUBLISHED.get(config.architecture, {})) if begin is not None else {}
    if num_classes is not None or not config.num_classes:
        options["num_classes"] = source.num_classes if num_classes is None else num_classes
    if input_shape is not None:
        channels, *size = input_shape
        if channels != config.input_size[0]:
            options["in_chans"] = channels
        if config.fixed_input_size and tuple(size) != tuple(config.input_size[1:]):
            options["img_size"] = tuple(size)
    return partial(timm.create_model, bare, pretrained=begin == "published", **options | kwargs)


def _timm_module(bare: str) -> str:
    return _timm().model_entrypoint(bare.partition(".")[0]).__module__


# ---- a file of the user's


def _is_file(name: str) -> bool:
    return name.endswith(".py") or ".py:" in name


def _resolve_file(name: str) -> ModelSource:
    file, factory = _load_factory(name)
    default = _parameters(factory).get("num_classes")
    num_classes = getattr(factory, "num_classes", default.default if default else None)
    shape = getattr(factory, "input_shape", None)
    return ModelSource(
        f"{file.as_posix()}:{factory.__name__}",
        "file",
        checked_shape(shape) if isinstance(shape, (tuple, list)) else None,
        num_classes if isinstance(num_classes, int) else None,
    )


def _build_file(
    source: ModelSource, num_classes: int | None, input_shape: Shape | None, pretrained: bool, kwargs: dict[str, Any]
) -> nn.Module:
    _, factory = _load_factory(source.name)
    options = dict(kwargs)
    if num_classes is not None and _takes(factory, "num_classes"):  # otherwise its scores have to fit as they are
        options["num_classes"] = num_classes
    if pretrained:
        options["pretrained"] = True
    _check_options(source.name, factory, options)
    if input_shape is not None and "input_shape" in _parameters(factory):
        options["input_shape"] = input_shape
    try:
        model = factory(**options)
    except Exception as error:
        raise ModelError(
            f"{source.name} raised {type(error).__name__}.",
            facts=_describe(error),
            help=f"call {factory.__name__}({_written(options)}) in Python and repair it",
        ) from error
    from torch import nn

    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{source.name} returned {_a(type(model).__name__)}, not an nn.Module.",
            help=f"let {factory.__name__} return the model",
        )
    return model


def _takes(factory: Callable[..., Any], name: str) -> bool:
    """Tell whether a factory has an argument of this name, or takes any."""
    parameters = inspect.signature(factory).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


def _load_factory(name: str) -> tuple[Path, Callable[..., Any]]:
    file, _, factory_name = (name, "", "") if name.endswith(".py") else name.rpartition(":")
    factory = outside.load(name, like="FACTORY", fits=_is_factory)
    if not _is_factory(factory):
        raise ModelError(
            f"{name!r} is {_a(type(factory).__name__)}, not a function or class that builds a model.",
            help=f"def make(): return {factory_name}   # then {file}:make",
        )
    return Path(file), factory


def _is_factory(value: Any) -> bool:
    return inspect.isroutine(value) or inspect.isclass(value)


# ---- shared by all sources


@dataclass(frozen=True)
class _Library:
    names: Callable[[], list[str]]
    resolve: Callable[[str], ModelSource | None]
    builder: Callable[[ModelSource, int | None, Shape | None, Begin, dict[str, Any]], Callable[[], nn.Module]]
    module: Callable[[str], str]
    """Dotted name of the file that defines a model."""


_LIBRARIES: Mapping[str, _Library] = MappingProxyType(
    {
        "cifar": _Library(_cifar_names, _resolve_cifar, _cifar_builder, _cifar_module),
        "tv": _Library(_tv_names, _resolve_tv, _tv_builder, _tv_module),
        "timm": _Library(_timm_names, _resolve_timm, _timm_builder, _timm_module),
    }
)


def _call(name: str, build: Callable[[], nn.Module], given: Mapping[str, Any], fetched: bool) -> nn.Module:
    """Build a library's model; what its constructor refuses becomes an error about what the user gave."""
    try:
        return build()
    except LocalizeError:
        raise
    except Exception as error:
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unexpected and unexpected.group(1) in given:
            raise _no_option(name, unexpected.group(1), ()) from error
        if fetched and isinstance(error, OSError):
            raise MissingError(
                f"the weights of {name} could not be fetched.",
                facts=[f"tried {_published_at(name)}", _describe(error)],
                help=Advice(
                    "once with a network connection; or pretrained=False",
                    "once with a network connection; or their file from elsewhere: --initial-checkpoint FILE",
                ),
            ) from error
        if given:
            raise OptionError(
                f"{name} cannot be built with {_written(given)}.",
                facts=_describe(error),
                help="leave the option out, or give another value",
            ) from error
        raise ModelError(
            f"{name} could not be built.", facts=_describe(error), help="localize doctor   # versions installed"
        ) from error


def _published_at(name: str) -> str:
    """Return where the library of a model keeps its weights."""
    library, _, bare = name.partition("/")
    if library == "tv":
        return _tv_weights(bare, _tv_task(bare)).url
    config = _timm().get_pretrained_cfg(bare)
    return f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else str(config.url)


def _check_options(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> None:
    parameters = _parameters(factory)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for option in options:
        if option not in parameters:
            raise _no_option(name, option, tuple(parameters))


def _no_option(name: str, option: str, choices: tuple[str, ...]) -> OptionError:
    facts = [f"its options: {', '.join(choices)}"] if choices else []
    if guess := did_you_mean(option, choices):
        facts.append(guess)
    return OptionError(f"{name} has no option {option!r}.", facts=facts, help=f"leave {option} out", option=option)


def _parameters(factory: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(factory).parameters


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _written(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "AEIOUaeiou" else f"a {noun}"


def _import(package: str) -> ModuleType:
    try:
        return import_module(package)
    except ImportError as error:
        root = package.partition(".")[0]
        raise MissingError(f"{root} cannot be imported.", facts=_describe(error), help=f"pip install {root}") from error
