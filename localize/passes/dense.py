"""Train a model that classifies pixels: a pass from a plan to a plan, after the method's design.

::

    CE(scores of the output, labels)   ->   mean over pixels, without those that have no label (class id 255)
    CE(scores of a head, labels)       ->   CE(scores of a head, shares of the classes among the labelled pixels)

Local heads give one vector of class scores for an image, as for a model that classifies images. Methods do not
know about pixels; whatever else they need from labels is refused.
"""

from __future__ import annotations

from dataclasses import replace

from localize.errors import MethodError
from localize.heads import blocks
from localize.heads.shares import ClassShares
from localize.ir import LocalLoss, Plan, Target, Term

IGNORE = 255
"""Class id of pixels without a label, as in PASCAL VOC and Cityscapes."""

SHARES = "class_shares"
"""Name of the block that makes the target of local heads."""


def fit_to_pixels(plan: Plan) -> Plan:
    """Return a plan whose losses fit labels (N, H, W), if the model's output is (N, Z, H, W); else the plan itself.

    Raises:
        MethodError: the method needs labels of whole images.
    """
    trunk = plan.segments.trunk
    if not trunk.output_size:
        return plan
    if plan.input is not None:
        raise _refused(plan, "shows labels with the images")
    if any(loss.part for loss in plan.losses):
        raise _refused(plan, "adds up parts of the batch by their numbers of images, and not of labelled pixels")
    losses = tuple(replace(loss, terms=tuple(_fitted(term, loss, plan) for term in loss.terms)) for loss in plan.losses)
    if not any(term.target.block == SHARES for loss in losses for term in loss.terms):
        return replace(plan, losses=losses)
    module = ClassShares(trunk.num_classes, IGNORE)
    block = blocks.of_module(SHARES, module, role="shared", facts={"ignore": IGNORE})
    told = (
        "The model classifies pixels: local heads give one vector of class scores for an image, and its target is the "
        f"share of every class among the labelled pixels (class id {IGNORE} is none); the sources classify images."
    )
    return replace(plan, blocks=(*plan.blocks, block), losses=losses, deviations=(*plan.deviations, told))


def _fitted(term: Term, loss: LocalLoss, plan: Plan) -> Term:
    if term.labels:
        raise _refused(plan, f"lets {term.head} read them ({loss.name})")
    if term.target.of == "error":
        raise _refused(plan, "feeds back the error of the output")
    if term.target.of != "labels":
        return term
    if term.target.block is not None or term.loss != blocks.CROSS_ENTROPY:
        how = f"maps them by {term.target.block}" if term.target.block else f"compares with {term.loss.split('.')[-1]}"
        raise _refused(plan, f"{how} ({loss.name})")
    if term.head is None:
        return replace(term, options=(*term.options, ("ignore_index", IGNORE)))
    return replace(term, target=Target("labels", SHARES))


def _refused(plan: Plan, what: str) -> MethodError:
    return MethodError(
        f"{plan.segments.trunk.name} classifies pixels, and {plan.method} needs one label for each image: it {what}.",
        facts="local heads of such a model are trained by cross-entropy with the shares of the classes alone.",
        help="a method whose local losses are cross-entropies; localize recipes ls",
    )
