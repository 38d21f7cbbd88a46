"""Layout of --help: shared options in groups, one line each; --help-all shows all options in full."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

PANELS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Model": ("model", "num_classes", "input_shape", "pretrained", "initial_checkpoint"),
        "Method": ("method", "recipe", "segments", "cut_at", "cut_by"),
        "Memory": ("recompute", "micro_batch", "amp", "grad_accum_steps"),
        "Data": ("data", "data_dir", "split", "augment", "mixup", "cutmix", "workers"),
        "Optimisation": (
            "epochs",
            "batch_size",
            "opt",
            "lr",
            "momentum",
            "weight_decay",
            "loss",
            "smoothing",
            "clip_grad",
            "seed",
            "device",
        ),
        "Schedule": ("sched", "milestones", "warmup_epochs"),
    }
)
"""Options shared by several commands or all methods that --help shows, by group."""
_MORE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Model": ("freeze", "leaf", "output_field", "trust_code"),
        "Method": ("shared",),
        "Memory": (
            "recompute_at",
            "micro_batch_at",
            "keep_at",
            "ghost_norm",
            "scores",
            "loss_scaling",
            "amp_dtype",
            "compile",
            "channels_last",
        ),
        "Data": ("skip_damaged", "hash_files", "download", "pixel_mean", "pixel_std"),
        "Optimisation": ("class_weights", "focal_gamma"),
        "Schedule": ("gamma", "warmup_lr", "stage_epochs", "freeze_after"),
        "Output": ("checkpoint_every", "log_tensorboard", "log_wandb"),
    }
)
"""Groups of the options that only --help-all shows; options in neither list belong to Optimisation."""
SHORT: Mapping[str, str] = MappingProxyType(
    {
        "model": "by name, or FILE.py:FACTORY; optional if the recipe names one",
        "num_classes": "number of classes",
        "method": "method or packaged recipe by name, or a class: FILE.py:CLASS, module:CLASS",
        "recipe": "a recipe: a file, or a folder that convert has written",
        "segments": "number of segments; max: one per local layer",
        "cut_at": "cut after these, as localize inspect names them",
        "cut_by": "what -K balances: layer, node, parameters, macs or memory",
        "initial_checkpoint": "start with the weights in this file",
        "pretrained": "start with published weights",
        "recompute": "what the backward computes again: none, head, body or all",
        "micro_batch": "images that a segment takes at a time; 0: the whole batch",
        "amp": "train under autocast to bfloat16",
        "grad_accum_steps": "batches averaged into one optimizer step",
        "data": "data set by name, folder, or FILE.py:NAME",
        "data_dir": "folder of a data set that is not bundled",
        "split": "share of each class to test on, if a folder has no test images",
        "augment": "none, crop4-flip, imagenet, timm, FILE.py:NAME",
        "workers": "processes that decode images",
        "weight_decay": "weight decay of every parameter",
        "clip_grad": "largest norm of gradients",
        "loss": "of class scores: cross-entropy, focal or bce",
        "smoothing": "share of each label that is spread over all classes",
        "mixup": "alpha of mixup, as in timm; 0: none",
        "cutmix": "alpha of CutMix, as in timm; 0: none",
        "opt": "name of an optimizer in timm, or FILE.py:NAME",
        "seed": "seed of everything random",
        "sched": "learning rate over the epochs: cosine, multistep, constant, none, ...",
        "milestones": "epochs after which multistep multiplies it by --gamma",
        "warmup_epochs": "epochs of linear warm-up",
        "resume": "continue the run in DIR",
        "accept_data": "with --resume: even if its data have changed",
        "output": "folder to write",
        "as_json": "print one JSON object",
    }
)
"""One-line texts of --help for options where the first clause of the full help does not fit."""
_LONGEST = 32
"""Characters for a flag with its value; its meaning starts after them."""


_HIDDEN = ("freeze", "leaf", "output_field", "shared", "class_weights", "focal_gamma", "trust_code", "resume_if_there",
           "processes", "max_restarts")  # fmt: skip
"""Flags written by hand that only --help-all shows."""


def panel(name: str) -> str:
    """Return the group of an option."""
    return next((p for lists in (PANELS, _MORE) for p, names in lists.items() if name in names), "Optimisation")


def is_shared(name: str) -> bool:
    """Return whether --help shows an option."""
    return any(name in names for names in PANELS.values())


def _show_all(ctx: typer.Context, asked: bool) -> None:
    if asked:
        ctx.meta["all"] = True
        typer.echo(ctx.get_help())
        raise typer.Exit


HelpAll = Annotated[
    bool, typer.Option("--help-all", is_eager=True, callback=_show_all, help="Show every option, in full.")
]


class Command(TyperCommand):
    """A command whose options are shown in groups."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Make help a little wider than usual if it is not read in a terminal."""
        if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
            extra.setdefault("terminal_width", 100)
        return super().make_context(info_name, args, parent, **extra)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options group by group, in the order of the groups."""
        everything = ctx.meta.get("all", False)
        grouped: dict[str, list[tuple[str, str]]] = {}
        params: list[Any] = self.get_params(ctx)
        for param in params:
            if everything:
                param.hidden = False
            record = param.get_help_record(ctx)
            name = param.name or ""
            if record is None or (name in _HIDDEN and not everything):
                continue
            group = getattr(param, "rich_help_panel", None) or (panel(name) if _is_known(name) else "Output")
            own = (
                group not in PANELS and group != "Output"
            )  # the options of one method: they are why help was asked for
            shown = record if everything or own else (_brief(record[0]), SHORT.get(name) or first_clause(record[1]))
            grouped.setdefault(group, []).append(shown)
        order = [*PANELS, *(one for one in grouped if one not in PANELS and one != "Output"), "Output"]
        for group in sorted(grouped, key=order.index):
            with formatter.section(group):
                formatter.write_dl(grouped[group], col_max=_LONGEST)


def _brief(flag: str) -> str:
    """Return a flag without its negation, with a single word for its values."""
    return re.sub(r"\S+\|\S+\|\S+", "NAME", flag.partition(" / ")[0]).replace(" <str>", "")


def first_clause(text: str) -> str:
    """Return the first clause of an option's help, and its default."""
    default = re.search(r"\bdefault:? ([^;\]]*?)[.\]]*$", text)
    clause = re.split(r"[;:]\s|\s\(|\s*\[", text)[0].rstrip(".")
    if "," in clause and len(clause) > 60:
        clause = clause.partition(",")[0]
    told = default.group(1) if default and len(default.group(1)) < 20 and default.group(1) != "False" else ""
    clause = clause[:1].lower() + clause[1:] if clause[1:2].islower() else clause
    return f"{clause} [{told}]" if told and told not in clause else clause


def _is_known(name: str) -> bool:
    return any(name in names for lists in (PANELS, _MORE) for names in lists.values())
