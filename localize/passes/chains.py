"""Find where a long segment divides itself into links: a dense block at what it concatenates again and again.

A segment that is swept in parts needs about as many sweeps as it has BatchNorms in series, so the work grows with the
square of its length. Where values are kept for the whole batch, sweeps start from them
(:func:`localize.ops.exact_parts`), and the work grows with the length of the longest link.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import fx, nn

from localize.graph.builder import ancestors
from localize.graph.links import CONCATENATIONS, operation_name
from localize.graph.operations import is_batch_norm
from localize.ir import facts, path_of
from localize.ops.parts import is_kept


def divided_at(graph: fx.Graph, twin: nn.Module) -> str:
    """Return the norms whose inputs divide a segment, by their last names with ``+`` between them; ``""`` if none do.

    These are the norms that read a growing concatenation (DenseNet: Huang, Liu, van der Maaten and Weinberger, 2017,
    equation 2). The longest concatenation holds all these values, so keeping them costs about as much as it does.

    Args:
        graph: of a segment.
        twin: holds the modules that the graph calls.
    """
    norms = {node: path_of(node) for node in graph.nodes if is_batch_norm(node, twin)}
    joined = {node: frozenset(_operands(node)) for node in graph.nodes if _concatenates(node)}
    growing = [own for own in joined.values() if any(own < other or other < own for other in joined.values())]
    read = {node: joined.get(node.all_input_nodes[0], frozenset(node.all_input_nodes)) for node in norms}
    readers = [node for node, values in read.items() if any(values <= own for own in growing)]
    if len({read[node] for node in readers}) < 2:
        return ""
    words = dict.fromkeys(norms[node].rpartition(".")[2] for node in readers)
    others = [path for node, path in norms.items() if node not in readers]
    keep = "+".join(word for word in words if not any(is_kept(path, word) for path in others))
    kept = {
        value for node in readers if is_kept(norms[node], keep) for value in read[node] if value.op != "placeholder"
    }
    return keep if kept and not _written_over(graph, kept) and _divide(graph, norms, kept) else ""


def _concatenates(node: fx.Node) -> bool:
    return node.op == "call_function" and operation_name(node) in CONCATENATIONS


def _operands(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the values that a concatenation puts together, those of concatenations inside it too."""
    for value in node.all_input_nodes:
        if _concatenates(value):
            yield from _operands(value)
        else:
            yield value


def _written_over(graph: fx.Graph, kept: set[fx.Node]) -> bool:
    """Tell whether an operation writes into a value that is kept, after it was made."""
    made: set[int | None] = set()
    for node in graph.nodes:
        if made.intersection(facts(node).mutates):
            return True
        if node in kept:
            made.add(facts(node).storage)
    return False


def _divide(graph: fx.Graph, norms: Iterable[fx.Node], kept: set[fx.Node]) -> bool:
    """Tell whether each norm is in one link alone: in what leads to one kept value, or to what the segment returns."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    links = [ancestors([target], kept - {target}) for target in (output, *kept)]
    counts = Counter(node for link in links for node in link)
    return all(counts[norm] <= 1 for norm in norms)
