"""Make the local layers of the papers from the places where a graph can be cut.

A block is a module in whose own forward a skip connection closes; outside blocks, a weighted operation with its
activation is a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

from torch import fx

from localize.cutting.places import LARGEST_SHARE, Place, Places
from localize.errors import CutError, did_you_mean
from localize.graph.operations import has_activation
from localize.ir import Cut, Grain, LocalLayer, Trunk, facts
from localize.torch_names import BATCH_NORMS


class Layers:
    """The local layers of one graph, as a method takes them, and all of its cuts."""

    def __init__(self, trunk: Trunk) -> None:
        self.places = Places(trunk)
        self.nodes, self.parameters, self.module = self.places.nodes, self.places.parameters, self.places.module

    @cached_property
    def candidates(self) -> tuple[Cut, ...]:
        """One cut for every group of places."""
        return tuple(self.places.cut(self.places.representative(group, "same")) for group in self.places.groups)

    def local_layers(self, grain: Grain) -> tuple[LocalLayer, ...]:
        """Make local layers: blocks, and weighted operations with their activation between them."""
        ends = self._lightened(self._layer_ends(grain), grain)
        cuts: list[Cut | None] = [None, *(self.places.cut(place) for place in ends), None]
        layers = []
        for index, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
            layers.append(LocalLayer(index, end.name if end else "output", start, end))
        return tuple(layers)

    def _lightened(self, ends: Sequence[Place], grain: Grain) -> list[Place]:
        """Add ends in layers that hold most of the model, where finer cuts leave no such layer."""
        bounds = [-1, *(place.index for place in ends), len(self.nodes) - 1]
        added = [place for first, last in pairwise(bounds) for place in self._inner_ends(first, last, grain)]
        return sorted([*ends, *added], key=lambda place: place.index)

    def _inner_ends(self, first: int, last: int, grain: Grain) -> list[Place]:
        share = self.places.share
        if share(first, last) <= LARGEST_SHARE:
            return []
        inner = [self.places.representative(group, grain.pool) for group in self.places.groups]
        inner = [place for place in inner if first < place.index < last]
        if any(self._has_hidden_linear(place.index + 1, grain) for place in inner):
            return []  # the method takes the whole classifier as a part of its last layer
        inner = [place for place in inner if self._is_layer(first + 1, place.index)]
        pieces = pairwise([first, *(place.index for place in inner), last])
        if not inner or max(share(*piece) for piece in pieces) > LARGEST_SHARE:
            return []
        middle = min(inner, key=lambda place: max(share(first, place.index), share(place.index, last)))
        halves = ((first, middle.index), (middle.index, last))
        return [middle, *(place for half in halves for place in self._inner_ends(*half, grain))]

    def _layer_ends(self, grain: Grain) -> list[Place]:
        ends: list[Place] = []
        start = 0
        places = [self.places.representative(group, grain.pool) for group in self.places.groups]
        for place, following in zip(places, (*places[1:], None), strict=False):
            block = self.places.block_around(place.index)
            if block is not None and place.index < block[1]:
                continue
            if following is not None and self._is_tied_until(place, following):
                continue
            if following is not None and grain.norm == "same" and self._only_normalises(place, following):
                continue
            if self._is_layer(start, place.index) and self._is_wanted(place, grain):
                ends.append(place)
                start = place.index + 1
        if grain.stem == "merged" and self.places.blocks:
            kept = [place for place in ends if place.index >= self.places.blocks[0][0]]
            ends = kept or ends
        if grain.classifier == "merged" and ends and self._is_classifier(start, grain):
            ends.pop()
        return ends

    def _is_tied_until(self, place: Place, following: Place) -> bool:
        """Tell whether a parameter is used on both sides of a place, but not of the next, and no layer lies between."""
        tied = self.places.tied
        return tied[place.index] and not tied[following.index] and not self._is_layer(place.index + 1, following.index)

    def _only_normalises(self, place: Place, following: Place) -> bool:
        """Tell whether nothing is trained between two places but BatchNorms, and nothing activates."""
        between = range(place.index + 1, following.index + 1)
        trained = [self.module.get(self.nodes[i]) for i in between if self.parameters[i]]
        activates = any(has_activation(self.nodes[i], self.module.get(self.nodes[i])) for i in between)
        return not activates and bool(trained) and all(isinstance(module, BATCH_NORMS) for module in trained)

    def _is_layer(self, first: int, last: int, *, preactivation: bool = True) -> bool:
        """Tell whether these nodes hold a block, or a weighted operation with an activation after it.

        With ``preactivation``, a normalisation and an activation before the weighted operation will do (DenseNet).
        """
        if self.places.has_block(first, last):
            return True
        normed = activated = weighted = False
        for i in range(first, last + 1):
            node = self.nodes[i]
            if not facts(node).depends:
                continue
            weighted = weighted or self.places.is_weighted(i)
            normed = normed or (bool(self.parameters[i]) and not weighted)
            if has_activation(node, self.module.get(node)):
                if weighted:
                    return True
                activated = normed
            if preactivation and activated and weighted:
                return True
        return False

    def _is_classifier(self, start: int, grain: Grain) -> bool:
        """Tell whether what follows the last cut is no layer of its own."""
        if not self._is_layer(start, len(self.nodes) - 1, preactivation=False):
            return True
        return self._has_hidden_linear(start, grain)

    def _has_hidden_linear(self, start: int, grain: Grain) -> bool:
        """Tell whether what follows is a classifier of several layers, which the method takes as one."""
        if grain.hidden_linear == "own" or not self._is_layer(start, len(self.nodes) - 1, preactivation=False):
            return False
        return self._is_flat_behind_maps([n for i, n in enumerate(self.nodes) if i >= start and self.parameters[i]])

    def _is_wanted(self, place: Place, grain: Grain) -> bool:
        return grain.hidden_linear == "own" or not self._is_flat_behind_maps(place.live)

    def _is_flat_behind_maps(self, values: Sequence[fx.Node]) -> bool:
        """Tell whether these values are flat vectors of a model that computes with maps or tokens before."""
        return self._has_maps and all(len(facts(v).shape or ()) == 1 for v in values)

    @cached_property
    def _has_maps(self) -> bool:
        """Tell whether the model computes with maps or tokens."""
        weighted = (n for i, n in enumerate(self.nodes) if self.parameters[i] and facts(n).depends)
        return any(len(facts(n).shape or ()) > 1 for n in weighted)

    def named(self, name: str, layers: Sequence[LocalLayer]) -> Cut:
        """Return the cut of this name.

        Raises:
            CutError: there is none.
        """
        known = {cut.name: cut for cut in self.candidates}
        known.update({layer.end.name: layer.end for layer in layers if layer.end is not None})
        if name not in known:
            raise CutError(
                f"no cut {name!r} in {self.places.trunk.name}.",
                facts=f"cuts: {', '.join(layer.end.name for layer in layers if layer.end)}; all {len(known)} with "
                "`localize inspect`",
                help=did_you_mean(name, known) or "localize inspect MODEL",
            )
        return known[name]
