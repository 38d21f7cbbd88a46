"""MLAAN: every segment learns from a loss of its own and from the cascades of neighbours that it is part of.

Y. Zhang, S. Zhang, P. Wang, F. Zhu, D. Guan, J. Su, J. Liu, C. Cai. MLAAN: scaling supervised local learning with
multilaminar leap augmented auxiliary network. AAAI 2025. Reference code: Wendy231015/MLAAN at 70effbe.

MLM, multilaminar local modules: segment s has an independent loss (its own head reads h_s) and, for every window of
``window`` segments, there is a cascaded loss after the last of them whose gradient reaches all of the window. The
model's own output is the cascade of the last window.

LAM, leap augmented modules: copies of later blocks of the trunk lie between a segment and its head. They are trained,
and pulled once per step towards the blocks they copy:

    gamma_s <- gamma_s - eta grad_gamma_s L(y_s, y)                                           (eq. 9)
    gamma_s <- EMA(gamma_s, theta_{s+M}) = m gamma_s + (1 - m) theta_{s+M}                    (eq. 10)
    beta_s  <- beta_s - sum_{n=i}^{i+k-1} eta grad_beta_s L(y_n, y)                           (eq. 11)
    theta_s <- theta_s - eta grad_theta_s L(y_s, y)                                           (eq. 12)

A window enters at the detached value of the cut before it and is one loss: the independent term of its first segment
and the cascaded term of its last, one backward. Segment s is run once for every window that holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Literal

from localize.errors import Advice, MethodError, OptionError, did_you_mean
from localize.heads import blocks, branches, narrow
from localize.heads.branch import Branch
from localize.heads.classifiers import CLASSIFIERS, Classifiers
from localize.heads.leap import Augmented, LaterBlock, copies, fit, later_blocks, leap
from localize.ir import Copy, Features, Grain, LabelKind, LocalLoss, Plan, Route, Segment, Segments
from localize.methods.base import ANY_LABELS, Local, needs_two, option

_BASES = {"dgl": "mlp-sr", "infopro": "1c2f"}
"""Methods on which this one is put, and their classifiers; InfoPro has decoders besides."""
_INFOPRO = ((5.0, 0.05), (0.2, 0.5))
"""Weights of reconstruction and classifier, at the first segment and at the last but one, from InfoPro's own runs."""


@dataclass(frozen=True)
class MLAAN(Local):
    """Independent and cascaded local losses, and auxiliary nets that are copies of later blocks."""

    name: ClassVar[str] = "mlaan"
    reference: ClassVar[str] = (
        "Y. Zhang, S. Zhang, P. Wang, F. Zhu, D. Guan, J. Su, J. Liu, C. Cai. MLAAN: scaling supervised local learning "
        "with multilaminar leap augmented auxiliary network. AAAI 2025. Code: Wendy231015/MLAAN at 70effbe."
    )
    labels: ClassVar[tuple[LabelKind, ...]] = ANY_LABELS
    deviations: ClassVar[tuple[str, ...]] = (
        "Copies of later blocks lie on the independent branch, as the paper's figures show; the code has them on the "
        "cascaded branch (lam=cascade).",
        "One chain of copies is trained and pulled, as eqs. 9 and 10 say; the code copies the first block twice, "
        "trains one copy, pulls the other, and adds them (lam_form=parallel). Copies that nothing reads, which the "
        "code pulls as well, are left out.",
        "Every chain is pulled; the released code for CIFAR pulls the last one only (ema_update=last_only).",
        "Copies are pulled after the update, the order of eqs. 9 and 10; the code pulls them before it (pull=before).",
        "Windows hold 3 segments, as the paper says; the code's MLAAN has 2, its DGL* and InfoPro* 3.",
        "Both kinds of loss have weight 1: the paper's equations have no weights; the code has 0.001 and 0.999.",
        "Every segment but the last has an independent loss; the code has none for those before the end of the first "
        "window (independent=windows).",
        "ResNet-32 has 15 segments and ResNet-110 54, the stem in the first, as the code builds them; the paper says "
        "16 and 55.",
        "A copied chain is the first block of every following stage and then the last blocks of the last stage, 4 in "
        "all; the code lists blocks by hand for each net, which chains=... restores. The paper does not say which.",
        "The independent loss reads the segment where its window runs it. The code runs each segment once more for it "
        "(3 and not 2 times with windows of 2, 4 and not 3 with windows of 3): gradients are the same, BatchNorm's "
        "running statistics move once less.",
        "With base=infopro the decoders read what the segment itself returns, not the copies after it, and the "
        "weights run from 5 and 0.05 to 0.2 and 0.5 over the segments; the code takes the number of the stage for that "
        "of the segment. With base=dgl the heads are those of DGL; the code's, by a file that was deleted from it, "
        "have 641,290 parameters at 64 channels.",
        "The trunk's output has one loss of weight 1, on the last window; the code for ImageNet, and that of MLM alone "
        "(resnetDGL_DFLocalPlus, CIFAR too), add one on the output of the independent stream: 0.001 and 0.999 of the "
        "cascade's in the first, 0.01 and 0.99 in the second, which also weighs all local losses so.",
        "Every chain is pulled once in a step; the code of LAM alone (resnetDGL_EMAPlus) pulls the last one twice, and "
        "so do the files for ImageNet.",
    )

    window: int = option(3, "number of segments that a cascaded loss trains together; 1: no cascades", low=1)
    lam: str = option(
        "independent",
        "which heads have copies of later blocks before them: those of single segments (independent, the paper), of "
        "windows (cascade, the code), or none",
        choices=("independent", "cascade", "none"),
    )
    lam_form: str = option(
        "pulled",
        "copies are trained and pulled (pulled, the paper), or the first is the sum of a trained and a pulled one "
        "(parallel, the code)",
        choices=("pulled", "parallel"),
    )
    w_indep: float = option(1.0, "weight of the independent losses; 0 leaves them out", low=0)
    w_casc: float = option(1.0, "weight of the cascaded losses", low=1e-6)
    independent: str = option(
        "all",
        "which segments have an independent loss: all but the last, or those where a window ends (windows, the code)",
        choices=("all", "windows"),
    )
    ema: float = option(0.995, "share that a copy keeps of itself when it is pulled, at most 1", low=0)
    pull: Literal["before", "after"] = option(
        "after", "copies are pulled before the update (the code) or after it (the paper)", choices=("before", "after")
    )
    ema_update: str = option(
        "all", "which chains of copies are pulled: all, or the last (last_only, the code)", choices=("all", "last_only")
    )
    base: str = option(
        "linear",
        "what reads the features: the heads of another method (dgl, infopro), or classifiers of these layers",
        choices=(*_BASES, *CLASSIFIERS),
    )
    head_width: int = option(0, narrow.MEANING, low=0)
    lam_blocks: int = option(4, "largest number of blocks in a chain of copies", low=1)
    chains: str = option(
        "",
        "blocks to copy for every segment but the last, as text: layer2.0,layer3.0;layer3.0;... (empty: by rule)",
    )

    @property
    def grain(self) -> Grain:
        """The code's modules: the stem in the first block, the classifier in the last."""
        return Grain(stem="merged", classifier="merged")

    def plan(self, segments: Segments) -> Plan:
        """Give every segment its independent loss, and every window its cascaded loss.

        Raises:
            MethodError: the window is the whole model; no later block can be copied after a segment.
            OptionError: options that leave nothing to do, or chains that do not fit.
        """
        self._check(segments)
        heads = _Heads(self, segments)
        declared = [self._loss(route, heads) for route in self._routes(len(segments))]
        losses = [replace(loss, name=f"loss_{i}") for i, (loss, _) in enumerate(declared)]
        attached = [head for _, own in declared for head in own]
        made = {block.name: block for head in attached for block in head.branch.blocks}
        return Plan(
            method=self.name,
            options=asdict(self),
            segments=segments,
            blocks=(*blocks.of_segments(segments), *made.values()),
            losses=tuple(losses),
            update="end",
            copies=tuple(self._pulled(attached)),
            pull=self.pull,
            reference=self.reference,
            deviations=(*self.deviations, *self._narrowed()),
        )

    def _narrowed(self) -> tuple[str, ...]:
        """Say what a limit of widths leaves of the paper's heads."""
        return narrow.told(self.head_width, decodes=self.base == "infopro", copies=self.lam != "none")

    def _check(self, segments: Segments) -> None:
        needs_two(self, segments)
        everywhere = self.w_indep > 0 and self.independent == "all"
        longest = min(len(segments) - 1, len(segments) // 2 + 1) if everywhere else len(segments) - 1
        shorter = f"window={longest} or less" if longest > 1 else "window=1"
        if self.window >= len(segments):
            needed = max(self.window + 1, 2 * self.window - 2) if everywhere else self.window + 1
            enough = len(segments.layout.layers) >= needed
            python, flags = (f", or cut={needed} or more", f", or -K {needed} or more") if enough else ("", "")
            raise MethodError(
                f"a window of {self.window} segments is all of {segments.trunk.name}, which has {len(segments)}: "
                "nothing would be trained locally.",
                help=Advice(f"{shorter}{python}", f"{Advice(shorter).flags}{flags}"),
            )
        early = [route for route in self._routes(len(segments)) if route.stop < self.window - 1]
        if early:
            raise MethodError(
                f"a window of {self.window} segments is too long for {segments.trunk.name}, which has {len(segments)}: "
                f"segment_{early[0].start} lies inside the first window and begins no window.",
                facts="its own loss could only be computed when segments after it have run.",
                help=Advice(f"{shorter}, or independent='windows'"),
            )
        if self.ema > 1:
            raise OptionError(
                f"a copy cannot keep ema={self.ema:g} of itself.", help=Advice("ema=0.995, at most 1"), option="ema"
            )
        if self.window == 1 and not self.w_indep:
            raise OptionError(
                "without cascades (window=1) and independent losses (w_indep=0) nothing is trained.",
                help=Advice("w_indep=1, or window=2"),
                option="w_indep",
            )
        if self.lam == "independent" and not self.w_indep:
            raise OptionError(
                "copies lie before the heads of single segments, and w_indep=0 leaves these out.",
                help=Advice("lam='cascade' or lam='none'"),
                option="lam",
            )
        if self.lam == "cascade" and self.window == 1:
            raise OptionError(
                "copies lie before the heads of windows, and window=1 has none.",
                help=Advice("lam='independent', or window=2"),
                option="lam",
            )

    def _routes(self, segments: int) -> list[Route]:
        """Return the routes of all losses in the order of their ends: a loss is differentiated before others run on.

        Windows are as long as ``window``; what has an independent loss and begins none is a route of its own.
        """
        windows = [Route(start, start + self.window - 1) for start in range(segments + 1 - self.window)]
        begun = {route.start for route in windows}
        alone = [Route(k, k) for k in range(segments - 1) if k not in begun and self._is_independent(k)]
        return sorted([*windows, *alone], key=lambda route: (route.stop, route.start))

    def _is_independent(self, segment: int) -> bool:
        """Tell whether a segment, which is not the last, has an independent loss."""
        return self.w_indep > 0 and (self.independent == "all" or segment >= self.window - 1)

    def _loss(self, route: Route, heads: _Heads) -> tuple[LocalLoss, tuple[_Head, ...]]:
        """Return the loss of a route, without its name, and its heads."""
        segments = heads.segments.segments
        last = len(segments) - 1
        own: list[_Head] = []
        if route.start < last and self._is_independent(route.start):
            own += [head.weighted(self.w_indep) for head in heads.independent(segments[route.start])]
        if route.start < route.stop < last:
            own += [head.weighted(self.w_casc) for head in heads.cascaded(segments[route.stop])]
        terms = [replace(head.branch.term, at=None if head.segment == route.stop else head.segment) for head in own]
        if route.stop == last:
            terms += blocks.output_loss(heads.segments).terms
        trained = [block.name for head in own for block in head.branch.blocks if block.parameters]
        reach = (*(segment.name for segment in segments[route.start : route.stop + 1]), *trained)
        return LocalLoss("", route, tuple(terms), reach), tuple(own)

    def _pulled(self, heads: Sequence[_Head]) -> Iterator[Copy]:
        """Yield the copies in all heads; if only the last chain is pulled, the others have no decay."""
        last = max((head.segment for head in heads if head.copies), default=None)
        for head in heads:
            for copy in head.copies:
                yield copy if self.ema_update == "all" or head.segment == last else replace(copy, decay=None)


@dataclass(frozen=True)
class _Head:
    """A branch, and the copies of trunk blocks in its head."""

    branch: Branch
    segment: int
    """The segment whose output it reads."""
    copies: tuple[Copy, ...] = ()

    def weighted(self, weight: float) -> _Head:
        """Return the same head with its term multiplied by ``weight``."""
        return replace(self, branch=self.branch.weighted(weight))


class _Heads:
    """Make the heads of the segments of one trunk."""

    def __init__(self, method: MLAAN, segments: Segments) -> None:
        self.method, self.segments, self.trunk = method, segments, segments.trunk
        self.blocks = later_blocks(self.trunk, method.grain) if method.lam != "none" else ()
        self.classifiers = Classifiers(_BASES.get(method.base, method.base), self.trunk, method.head_width)
        self.chosen = self._read_chains() if method.chains and method.lam != "none" else None

    def independent(self, segment: Segment) -> list[_Head]:
        """Return the heads of a segment's independent loss."""
        return self._heads(segment, "head", augmented=self.method.lam == "independent")

    def cascaded(self, segment: Segment) -> list[_Head]:
        """Return the heads of the cascaded loss of the window that ends with a segment."""
        return self._heads(segment, "cascade", augmented=self.method.lam == "cascade")

    def _heads(self, segment: Segment, prefix: str, *, augmented: bool) -> list[_Head]:
        name = f"{prefix}_{segment.index}"
        chain = self._chain(segment) if augmented else ()
        read = replace(segment, features=chain[-1].part.outputs) if chain else segment
        classifier = self.classifiers.behind(read, name)
        head = self._behind(chain, classifier, segment) if chain else _Head(classifier, segment.index)
        if self.method.base != "infopro":
            return [head]
        share = segment.index / max(1, len(self.segments) - 2)
        reconstruction, task = ((1 - share) * first + share * last for first, last in zip(*_INFOPRO, strict=True))
        decoder = narrow.narrowed(
            segment,
            self.method.head_width,
            lambda read: branches.reconstruction(read, self.trunk, f"{name}_decoder"),
            side=0,
        )
        return [_Head(decoder.weighted(reconstruction), segment.index), head.weighted(task)]

    def _behind(self, chain: Sequence[LaterBlock], branch: Branch, segment: Segment) -> _Head:
        """Put copies of later blocks before the head of a branch."""
        twice = self.method.lam_form == "parallel"
        head = next(block for block in branch.blocks if block.name == branch.term.head)
        assert head.module is not None, f"{head.name} is made by a branch, as a module"
        augmented = blocks.of_module(
            head.name,
            Augmented(chain, head.module, self.trunk, twice=twice),
            *(features.shape for features in segment.features),
            facts={**head.facts, "copies": [block.name for block in chain]},
        )
        kept = tuple(augmented if block is head else block for block in branch.blocks)
        pulled = copies(head.name, chain, twice=twice, decay=self.method.ema)
        return _Head(replace(branch, blocks=kept), segment.index, pulled)

    # -- which blocks are copied

    def _chain(self, segment: Segment) -> tuple[LaterBlock, ...]:
        """Return the blocks that are copied after a segment.

        Raises:
            MethodError: none after it takes what it returns.
        """
        if self.chosen is not None:
            return self.chosen[segment.index]
        chain = leap(self.blocks, segment, self.method.lam_blocks)
        if not chain:
            behind = [block.name for block in self.blocks if block.index > segment.layers[1]]
            raise MethodError(
                f"no block after segment {segment.index} of {self.trunk.name} can be copied.",
                facts=[
                    f"it ends at {segment.ends_at} and returns {_shapes(segment.features)}; copies keep their shapes.",
                    f"blocks after it are {', '.join(behind) or 'none'}.",
                ],
                help=Advice("lam='none', or other cuts"),
            )
        return chain

    def _read_chains(self) -> tuple[tuple[LaterBlock, ...], ...]:
        """Return the chains that are given as text, one for every segment but the last.

        Raises:
            OptionError: another number of chains than of segments, an unknown block, one that does not lie after the
                segment, or one that does not take what is before it.
        """
        texts = [text.strip() for text in self.method.chains.split(";")]
        local = self.segments.segments[:-1]
        if len(texts) != len(local):
            raise OptionError(
                "chains does not name the blocks of every segment but the last.",
                facts=f"{self.trunk.name} has {len(local)} such segments, and chains names the blocks of {len(texts)}.",
                help="one list for each, with ; between them: layer2.0,layer3.0;layer3.0",
                option="chains",
            )
        return tuple(self._read_chain(text, segment) for text, segment in zip(texts, local, strict=True))

    def _read_chain(self, text: str, segment: Segment) -> tuple[LaterBlock, ...]:
        known = {block.name: block for block in self.blocks}
        features, where, chain = segment.features, segment.ends_at, []
        for name in (name.strip() for name in text.split(",") if name.strip()):
            if name not in known:
                raise OptionError(
                    f"no block {name!r} of {self.trunk.name} can be copied.",
                    facts=f"blocks are {', '.join(known)}.",
                    help=did_you_mean(name, known),
                    option="chains",
                )
            block = known[name]
            if block.index <= segment.layers[1]:
                raise OptionError(
                    f"block {name!r} does not lie after segment {segment.index}, up to {segment.ends_at}.",
                    option="chains",
                )
            if not fit(features, block.part.inputs):
                raise OptionError(
                    f"a copy of {name!r} does not fit after {where}.",
                    facts=f"it takes {_shapes(block.part.inputs)}, and {where} returns {_shapes(features)}.",
                    option="chains",
                )
            chain.append(block)
            features, where = block.part.outputs, name
        if not chain:
            raise OptionError(
                f"chains names no block for segment {segment.index}, up to {segment.ends_at}.", option="chains"
            )
        return tuple(chain)


def _shapes(features: Sequence[Features]) -> str:
    return " and ".join("x".join(map(str, f.shape)) for f in features)
