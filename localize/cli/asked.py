"""Turn the typed arguments into a recipe; flags override the recipe."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localize.cli.flags import (
    Classes,
    ClassWeights,
    CutAt,
    CutBy,
    FocalGamma,
    Freeze,
    InputShape,
    Leaf,
    LossName,
    MethodName,
    OutputField,
    RecipeFile,
    SegmentCount,
    Shared,
    Smoothing,
    TrustCode,
    read_like,
    read_number,
)
from localize.errors import OptionError, UnknownNameError, did_you_mean

if TYPE_CHECKING:
    from localize.ir import CutSpec
    from localize.recipes import Recipe


@dataclass(frozen=True)
class Asked:
    """What the command line asks to build, as it was typed: every field is a flag or a group of flags.

    A command may leave out fields (:class:`localize.cli.flags.Without`); they keep their defaults.
    """

    method: MethodName = None
    recipe: RecipeFile = None
    segments: SegmentCount = None
    cut_at: CutAt = None
    cut_by: CutBy = None
    shared: Shared = False
    freeze: Freeze = None
    leaf: Leaf = None
    output_field: OutputField = None
    num_classes: Classes = None
    input_shape: InputShape = None
    loss: LossName = None
    smoothing: Smoothing = None
    class_weights: ClassWeights = None
    focal_gamma: FocalGamma = None
    trust_code: TrustCode = False
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_empty(self) -> bool:
        """Whether none of these flags was typed."""
        return dataclasses.replace(self, trust_code=False) == Asked()

    def cut(self) -> CutSpec | None:
        """Return the cuts that were asked for; None if there are none.

        Raises:
            OptionError: the flags contradict each other, or name no cut.
        """
        from localize.ir import CutSpec

        if self.segments is None and self.cut_at is None and self.cut_by is None:
            return None
        if self.segments is not None and self.cut_at is not None:
            raise OptionError(
                "-K and --cut-at were both given.",
                facts="--cut-at already fixes the number of segments.",
                help="use only one of them",
            )
        ways = ("layer", "node", "parameters", "macs", "memory")
        if self.cut_by is not None and self.cut_by not in ways:
            raise OptionError(
                f"--cut-by cannot be {self.cut_by!r}.",
                facts=f"its values are {', '.join(ways)}.",
                help=did_you_mean(self.cut_by, ways),
            )
        count: Any = self.segments or "max"
        if count not in ("max", "sqrt"):
            count = read_number(count, int)
            if not isinstance(count, int) or count < 1:
                raise OptionError(
                    f"-K cannot be {self.segments}.",
                    facts="it must be a number of segments, or max.",
                    help="-K 4, or -K max",
                )
        names = tuple(name.strip() for name in (self.cut_at or "").split(",") if name.strip())
        if self.cut_at is not None and not names:
            raise OptionError("--cut-at names no cut.", help="localize inspect MODEL lists the cuts")
        return CutSpec(segments=count, at=names, by=self.cut_by or "layer")  # type: ignore[arg-type]

    def build_recipe(self, model: str | None) -> Recipe:
        """Combine the typed flags into a recipe for a model; flags override the recipe.

        Raises:
            OptionError: none or two methods were named, the method does not have an option, or an option cannot take
                a value.
            UnknownNameError: there is no such method.
            UntrustedCodeError: the recipe of a folder names a file of code, see :mod:`localize.recipes.trust`.
        """
        from localize import methods, options, recipes
        from localize.passes import labels
        from localize.recipes import trust

        cut = self.cut()
        base = recipes.load(self._source(model))
        if self.recipe and not model and Path(self.recipe).is_dir():
            trust.refuse_untrusted(self.recipe, base, trust_code=self.trust_code)
        defaults = {one.name: one.default for one in options.of(methods.get(base.method))}
        typed, own = dict(self.options), labels.own(base.method)
        if self.loss in own:
            typed["loss"] = self.loss
        for name in typed:
            if name not in defaults:
                raise _no_such_option(base.method, name, list(defaults))
        given = {name: read_like(value, defaults[name]) for name, value in typed.items()}
        merged = {**base.options, **given}
        methods.create(base.method, **merged)
        other_model = bool(model) and model != base.model
        return dataclasses.replace(
            base,
            model=model or base.model,
            model_options={} if other_model else base.model_options,
            options=merged,
            cut=cut or base.cut,
            shared=self.shared or base.shared,
            freeze=tuple(self.freeze or ()) or (() if other_model else base.freeze),
            leaf=tuple(self.leaf or ()) or (() if other_model else base.leaf),
            output=self.output_field or (None if other_model else base.output),
            schedule={**base.schedule, **_typed(self.schedule)},
            loss=self._loss(base.loss, own),
            num_classes=base.num_classes if self.num_classes is None else self.num_classes,
            input_shape=read_shape(self.input_shape) or base.input_shape,
        )

    def _loss(self, base: Mapping[str, Any], own: Sequence[str]) -> Mapping[str, Any]:
        """Return the loss of class scores: the typed settings, and the recipe's for the rest.

        Names in ``own`` are options of the method itself, and keep that meaning.
        """
        from localize.passes import labels

        name = None if self.loss in own else self.loss
        typed: dict[str, Any] = {} if name is None else {"name": name}
        for key, text in (("smoothing", self.smoothing), ("gamma", self.focal_gamma)):
            if text is not None:
                typed[key] = read_number(text, float)
        if self.class_weights is not None:
            typed["weights"] = read_numbers(self.class_weights)
        if not typed:
            return base
        kept = {key: value for key, value in base.items() if key != "gamma" or name in (None, base.get("name"))}
        return labels.create({**kept, **typed}, own).told

    def _source(self, model: str | None) -> str:
        """Return the name of the method or recipe that was typed beside a model."""
        from localize import methods, recipes

        facts = f"methods are {', '.join(methods.names())}; there are also {len(recipes.names())} recipes."
        if self.method and self.recipe:
            raise OptionError("--method and --recipe were both given.", help="use only one of them")
        if not (self.method or self.recipe):
            is_recipe = model is not None and model.endswith((".yaml", ".yml"))
            help = f"--recipe {model}" if is_recipe else "--method NAME, or --recipe FILE (localize recipes ls)"
            raise OptionError("no method was given.", facts=facts, help=help)
        known = [*methods.names(), *recipes.names()]
        if self.method and not (self.method in known or methods.exists(self.method) or self.method.endswith(".py")):
            raise UnknownNameError(
                f"there is no method {self.method!r}.",
                facts=facts,
                help=did_you_mean(self.method, known)
                or "localize methods; --method FILE.py:CLASS or --recipe FILE for one of your own",
            )
        return self.method or self.recipe or ""


def _no_such_option(method: str, name: str, known: list[str]) -> OptionError:
    from localize import methods, options

    owners = [one for one in methods.names() if name in {option.name for option in options.of(methods.get(one))}]
    return OptionError(
        f"method {method!r} has no option --{name.replace('_', '-')}.",
        facts=f"its options are {', '.join('--' + f.replace('_', '-') for f in known) or 'none'}.",
        help=did_you_mean(name.replace("_", "-"), [one.replace("_", "-") for one in known])
        or (f"--method {' or '.join(owners)} has it; otherwise leave it out" if owners else "leave it out"),
    )


def _typed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the typed options of a schedule as values."""
    from localize.passes.schedule import Schedule, create

    kinds = {item.name: type(item.default) for item in dataclasses.fields(Schedule)}
    typed = {name: read_number(value, kinds[name]) for name, value in given.items()}
    create(**typed)
    return typed


def read_shape(text: str | None) -> tuple[int, ...] | None:
    """Return the sizes in a text such as ``3,32,32`` or ``3x32x32``; None if there is no text."""
    if text is None:
        return None
    sizes = [read_number(part, int) for part in text.replace("x", ",").split(",")]
    if len(sizes) < 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise OptionError(
            f"--input-shape cannot be {text!r}.",
            facts="it must be channels, height, width (for videos: channels, frames, height, width).",
            help="--input-shape 3,32,32",
        )
    return tuple(sizes)


def read_numbers(text: str) -> list[float]:
    """Return the numbers in a comma-separated list, or in a file: JSON, or text separated by commas or whitespace.

    Raises:
        OptionError: the text is neither a list nor a file, or the file does not contain numbers.
    """
    path = Path(text).expanduser()
    plain = all(isinstance(read_number(part, float), float) for part in text.split(","))
    help = "--class-weights 1,2,0.5, or a file with one number for each class"
    if not plain and not path.is_file():
        raise OptionError(
            f"--class-weights cannot be {text!r}.",
            facts="it is not a list of numbers separated by commas, and there is no such file.",
            help=help,
        )
    try:
        written = text if plain else path.read_text(encoding="utf-8")
        return [float(part) for part in re.split(r"[\s,]+", written.strip().strip("[]").strip())]
    except (OSError, ValueError) as error:
        raise OptionError(f"{path} does not contain class weights.", facts=f"{error}.", help=help) from error


def is_folder(target: str) -> bool:
    """Return whether a target is a folder rather than a model's name: it looks like a path."""
    return Path(target).is_dir() or target.startswith((".", "/", "~")) or target.endswith("/")


def refuse_beside_folder(target: str, asked: Asked) -> None:
    """Refuse flags together with a folder, because its recipe already fixes everything.

    Raises:
        OptionError: such a flag was typed.
    """
    if not asked.is_empty:
        raise OptionError(
            f"{target} is a folder, and its recipe says what was built.",
            facts="method, cuts and options cannot be changed here.",
            help="localize convert, to build something else",
        )
