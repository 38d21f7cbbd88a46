"""The pictures of analyses, drawn with matplotlib: readable in print, and for readers who cannot distinguish colours.

Each curve has its own colour (Okabe and Ito, 2008), dash and marker. The cells of a matrix show their values; darker
means more. The same numbers give the same file.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from localize.analysis.confusions import OUTPUT, Confusion
from localize.analysis.costs import COSTS, Costs
from localize.analysis.curves import QUANTITIES, Convergence
from localize.analysis.embeddings import Labels
from localize.analysis.found import Depths, Found
from localize.analysis.kernels import CKA
from localize.analysis.maps import Features, LayerMaps, Saliency
from localize.analysis.planes import Neighbours
from localize.errors import MissingError
from localize.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p")
GREY = "#7f7f7f"
MOST_NAMED = 30
"""Largest number of classes whose names are written next to their points."""
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "savefig.bbox": "tight",
    "svg.fonttype": "none",
    "svg.hashsalt": "localize",
}


def check() -> None:
    """Import matplotlib.

    Raises:
        MissingError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingError(
            "pictures need the package matplotlib, which cannot be imported.",
            facts=str(error),
            help='pip install "torch-localize[plots]"; --json and --csv work without it',
        ) from error


def save(found: Found, path: Path) -> None:
    """Draw the results of an analysis into a file, as SVG or PNG according to its name.

    Raises:
        MissingError: matplotlib is not installed, or the file cannot be written.
    """
    check()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(dict[Any, Any](STYLE)):
        figure = Figure(layout="constrained", dpi=110)
        _DRAWN[type(found)](found, figure)
        try:
            with replacing(path) as temporary:
                figure.savefig(temporary, metadata={"Date": None} if path.suffix == ".svg" else {})
                if path.suffix == ".png":  # 256 colours: a quarter of the size
                    with Image.open(temporary) as picture:
                        picture.convert("RGB").quantize(256).save(temporary, format="PNG", optimize=True)
        except OSError as error:
            raise MissingError(f"{path} cannot be written.", facts=str(error), help="another folder") from error


def looks(count: int) -> Iterator[dict[str, Any]]:
    """Yield styles of curves: the first 35 differ in colour or dash, the first 77 in colour or marker."""
    for index in range(count):
        yield {
            "color": COLOURS[index % len(COLOURS)],
            "linestyle": DASHES[index % len(DASHES)],
            "marker": MARKERS[index % len(MARKERS)],
        }


# -------------------------------------------------------------------------------------------------------------- curves


def _depths(found: Depths, figure: Figure) -> None:
    drawn = found.drawn or tuple(found.quantities)
    panels = _panels(figure, len(drawn), wide=5.2, high=3.6)
    for axes, quantity in zip(panels, drawn, strict=True):
        lines = found.averaged(quantity)
        names = _merged([[name for name, *_ in line] for line in lines.values()])
        styles = looks(len(lines))
        for group, line in lines.items():
            look = {"color": GREY, "linestyle": (0, (3, 2)), "marker": "x"} if group == found.baseline else next(styles)
            layers, _, middle, low, high = zip(*line, strict=True)
            across = [names.index(layer) for layer in layers]
            axes.plot(across, middle, label=group, **look)
            if len(found.groups[group]) > 1:
                axes.fill_between(across, low, high, color=look["color"], alpha=0.18, linewidth=0)
        axes.set_ylabel(found.quantities[quantity])
        axes.set_xlabel("after")
        _name_layers(axes, names)
    _legend(figure, panels[0], len(found.groups))
    figure.suptitle(found.title, fontsize=10.5)


def _merged(lists: Sequence[Sequence[str]]) -> list[str]:
    """Return all names of several lists, each once, in an order that agrees with all lists."""
    merged: list[str] = []
    for names in lists:
        place = 0
        for name in names:
            if name not in merged:
                merged.insert(place, name)
            place = merged.index(name) + 1
    return merged


def _name_layers(axes: Axes, names: Sequence[str]) -> None:
    every = -(-len(names) // 16)
    turned: Any = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 3 else {}
    axes.set_xticks(range(0, len(names), every), names[::every], **turned)


def _legend(figure: Figure, axes: Axes, count: int) -> None:
    if count > 1:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(count, 5), handlelength=4)


def _panels(figure: Figure, count: int, *, wide: float, high: float, columns: int = 3) -> list[Axes]:
    columns = min(columns, count)
    lines = -(-count // columns)
    figure.set_size_inches(wide * columns, high * lines)
    return [figure.add_subplot(lines, columns, index + 1) for index in range(count)]


# ------------------------------------------------------------------------------------------------------------ matrices


def _confusion(found: Confusion, figure: Figure) -> None:
    local = {name: shares for name, shares in found.by_class.items() if name != OUTPUT}
    side = _side(len(found.classes))
    axes, *more = _panels(figure, 2 if len(local) > 1 else 1, wide=side, high=side - 0.6)
    values = found.shares[OUTPUT].tolist()
    _matrix(figure, axes, values, found.classes, found.classes, 0, 1, "share of the class's images")
    axes.set_xlabel("predicted")
    axes.set_ylabel("class")
    axes.set_title(f"the model's own predictions: {100 * found.accuracy[OUTPUT]:.1f} % right", fontsize=10.5)
    for beside in more:
        by_class = [list(values) for values in zip(*local.values(), strict=True)]
        _matrix(figure, beside, by_class, found.classes, list(local), 0, 1, "share of right predictions")
        beside.set_title("right predictions by local losses", fontsize=10.5)


def _cka(found: CKA, figure: Figure) -> None:
    wide, high = _side(len(found.columns)), _side(len(found.rows)) - 0.6
    (axes,) = _panels(figure, 1, wide=wide, high=high)
    values = found.values.tolist()
    _matrix(figure, axes, values, found.rows, found.columns, min(0.0, *itertools.chain(*values)), 1, "linear CKA")
    axes.set_ylabel("layers of the first run")
    axes.set_xlabel("layers of the second run")
    axes.set_title("similarity of layers", fontsize=10.5)


def _side(count: int) -> float:
    return 2.2 + 0.4 * min(max(count, 4), 22)


def _matrix(
    figure: Figure,
    axes: Axes,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    low: float,
    high: float,
    told: str,
) -> None:
    """Draw a matrix in colours of increasing lightness; with up to 12 columns, the cells show their values."""
    image = axes.imshow(values, cmap="Blues", vmin=low, vmax=high, aspect="auto")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    _name_layers(axes, columns)
    every = -(-len(rows) // 24)
    axes.set_yticks(range(0, len(rows), every), rows[::every])
    if len(columns) <= 12 and len(rows) <= 24:
        colours_of: Any = image.to_rgba
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if value == value and round(value, 2):
                    red, green, blue, _ = colours_of([value])[0]
                    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
                    cell = f"{value:.2f}".replace("0.", ".", 1)
                    axes.text(j, i, cell, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    figure.colorbar(image, ax=axes, label=told, shrink=0.8)


# ------------------------------------------------------------------------------------------------- runs side by side


def _convergence(found: Convergence, figure: Figure) -> None:
    from matplotlib.ticker import MaxNLocator

    panels = _panels(figure, 2, wide=4.6, high=3.4)
    for axes, (quantity, told) in zip(panels, QUANTITIES.items(), strict=True):
        for (group, line), look in zip(found.averaged(quantity).items(), looks(len(found.groups)), strict=True):
            epochs, middle, low, high = zip(*line, strict=True)
            every = -(-len(epochs) // 12)
            axes.plot(epochs, middle, label=group, markevery=every, **look)
            if len(found.groups[group]) > 1:
                axes.fill_between(epochs, low, high, color=look["color"], alpha=0.18, linewidth=0)
        axes.set_xlabel("epoch")
        axes.set_ylabel(told)
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    lowest = [min(low for _, _, low, _ in line) for line in found.averaged("train_loss").values()]
    if min(lowest) > 0:
        panels[0].set_yscale("log")
    _legend(figure, panels[0], len(found.groups))
    figure.suptitle("convergence: mean and range over seeds", fontsize=10.5)


def _costs(found: Costs, figure: Figure) -> None:
    panels = _panels(figure, len(COSTS), wide=3.8, high=3.5)
    for axes, (cost, told) in zip(panels, COSTS.items(), strict=True):
        for (name, one), look in zip(found.by.items(), looks(len(found.by)), strict=True):
            across = one.told(cost)
            if across is None:
                continue
            spread = [[one.accuracy - min(one.accuracies)], [max(one.accuracies) - one.accuracy]]
            axes.errorbar(
                [across], [one.accuracy], yerr=spread, capsize=3, label=name, color=look["color"],
                marker=look["marker"], linestyle="none", markersize=8, markeredgecolor="white",
            )  # fmt: skip
        front = [(found.by[name].told(cost), found.by[name].accuracy) for name in found.front(cost)]
        if front:
            costs, upward = zip(*front, strict=True)
            axes.step(costs, upward, where="post", color=GREY, linestyle=(0, (4, 2)), linewidth=1.2, zorder=0)
        axes.set_xlabel(told)
        known = [value for one in found.by.values() if (value := one.told(cost)) is not None]
        axes.set_xlim(0, 1.1 * max(known, default=1))
    panels[0].set_ylabel("test accuracy")
    _legend(figure, panels[0], len(found.by))
    figure.suptitle(f"accuracy over cost, steps of {found.batch_size} images; dashed: Pareto front", fontsize=10.5)


# -------------------------------------------------------------------------------------------------------------- labels


def _labels(found: Labels, figure: Figure) -> None:
    name, similarity = list(found.similarity.items())[-1]
    side = _side(len(found.classes))
    first, second, third, fourth = _panels(figure, 4, wide=side, high=side - 0.6, columns=2)
    values = similarity.tolist()
    low = min(0.0, *itertools.chain(*values))
    _matrix(figure, first, values, found.classes, found.classes, low, 1, "cosine")
    first.set_title(f"similarity of embeddings ({name})", fontsize=10.5)
    _matrix(figure, second, found.confused.tolist(), found.classes, found.classes, 0, 1, "share of the class's images")
    second.set_title("confusion (rows: class)", fontsize=10.5)
    pairs = found.pairs()
    third.plot([100 * pair[3] for pair in pairs], [pair[2] for pair in pairs], "o", color=COLOURS[0], alpha=0.7)
    third.set_xlabel("confusion of two classes, % (both ways, mean)")
    third.set_ylabel("cosine of their embeddings")
    told = "" if found.correlation is None else f", correlation {round(found.correlation, 2) + 0.0:.2f}"
    third.set_title(f"pairs of classes{told}", fontsize=10.5)
    across, upward = zip(*found.places.tolist(), strict=True)
    fourth.plot(across, upward, "o", color=COLOURS[1])
    for label, x, y in zip(found.classes, across, upward, strict=True):
        fourth.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    fourth.set_title("embeddings in a plane (t-SNE)", fontsize=10.5)
    fourth.set_xticks([])
    fourth.set_yticks([])


def _neighbours(found: Neighbours, figure: Figure) -> None:
    from matplotlib.patheffects import withStroke

    few = _evenly(list(found.places), 6)
    panels = _panels(figure, len(few), wide=3.3, high=3.2)
    same = found.same()
    for axes, layer in zip(panels, few, strict=True):
        points = found.places[layer].tolist()
        for label, look in zip(range(len(found.classes)), looks(len(found.classes)), strict=True):
            own = [place for place, one in zip(points, found.labels, strict=True) if one == label]
            if own:
                across, upward = zip(*own, strict=True)
                style = {"color": look["color"], "marker": look["marker"], "label": found.classes[label]}
                axes.plot(across, upward, linestyle="none", markersize=3.5, alpha=0.8, **style)
                if len(found.classes) <= MOST_NAMED:
                    middle = statistics.median(across), statistics.median(upward)
                    axes.annotate(
                        found.classes[label], middle, ha="center", va="center", fontsize=8.5, fontweight="bold",
                        path_effects=[withStroke(linewidth=2.5, foreground="white")],
                    )  # fmt: skip
        axes.set_title(f"after {layer}: {100 * same[layer]:.0f} %", fontsize=9.5)
        axes.set_xticks([])
        axes.set_yticks([])
    if len(found.classes) <= MOST_NAMED:
        _legend(figure, panels[0], len(found.classes))
    figure.suptitle("t-SNE of test images; %: the nearest point is of the same class", fontsize=10.5)


# ---------------------------------------------------------------------------------------------------------------- maps


def _saliency(found: Saliency, figure: Figure) -> None:
    layers = _evenly(list(found.maps), 7)
    tops = len(found.answers[0])
    columns = 1 + len(layers) + tops - 1
    figure.set_size_inches(1.25 * columns, 1.5 * len(found.images))
    for n in range(len(found.images)):
        cells = [("", None), *((layer, found.maps[layer][n, 0]) for layer in layers)]
        cells += [(layers[-1], found.maps[layers[-1]][n, k]) for k in range(1, tops)]
        for column, (layer, shown) in enumerate(cells):
            axes = _cell(figure, len(found.images), columns, n * columns + column + 1)
            _picture(axes, found.pixels[n])
            if shown is None:
                axes.set_title(f"class {found.classes[found.truth[n]]}", fontsize=8)
                continue
            extent = axes.get_images()[0].get_extent()
            axes.imshow(
                shown.numpy(), cmap="magma", vmin=0, vmax=1, alpha=0.75, extent=extent, interpolation="bilinear"
            )
            label = found.answers[n][max(0, column - len(layers))]
            axes.set_title(f"{layer}\nlike {found.classes[label]}", fontsize=7)
    figure.suptitle("where features look like a label (bright: most), by layer; last: the second answer", fontsize=9.5)


def _features(found: Features, figure: Figure) -> None:
    if len(found.by) > 1:
        shown = _side_by_side(found, 8)
        columns = 1 + max(map(len, shown.values()))
        figure.set_size_inches(1.3 * columns, 1.6 * len(found.by))
        for row, (run, beside) in enumerate(shown.items()):
            first = _cell(figure, len(found.by), columns, row * columns + 1)
            _picture(first, found.pixels[run])
            first.set_title(found.names[run], fontsize=8)
            for column, one in enumerate(beside, start=2):
                axes = _cell(figure, len(found.by), columns, row * columns + column)
                axes.imshow(one.mean.numpy(), cmap="magma")
                axes.set_title(one.layer, fontsize=7)
        figure.suptitle("mean of the absolute values of all channels (bright: large)", fontsize=9.5)
        return
    ((run, layers),) = found.by.items()
    few = _evenly(list(layers), 8)
    columns = 2 + max(len(one.channels) for one in few)
    figure.set_size_inches(1.2 * columns, 1.4 * len(few))
    for row, one in enumerate(few):
        first = _cell(figure, len(few), columns, row * columns + 1)
        _picture(first, found.pixels[run])
        first.set_title(one.layer, fontsize=7.5)
        cells = [("mean", one.mean), *((f"channel {c}", m) for c, m in zip(one.channels, one.maps, strict=True))]
        for column, (told, values) in enumerate(cells, start=2):
            axes = _cell(figure, len(few), columns, row * columns + column)
            axes.imshow(values.numpy(), cmap="magma")
            axes.set_title(told, fontsize=7)
    figure.suptitle("feature maps of the channels with the largest mean square (bright: large)", fontsize=9.5)


def _side_by_side(found: Features, most: int) -> dict[str, list[LayerMaps]]:
    """Return layers by run: those that all runs have or, if there is at most one such layer, each run's own."""
    own = {run: {one.layer: one for one in layers} for run, layers in found.by.items()}
    common = [name for name in next(iter(own.values())) if all(name in layers for layers in own.values())]
    return {
        run: [layers[name] for name in _evenly(common if len(common) > 1 else list(layers), most)]
        for run, layers in own.items()
    }


def _cell(figure: Figure, rows: int, columns: int, place: int) -> Axes:
    axes = figure.add_subplot(rows, columns, place)
    axes.set_axis_off()
    return axes


def _picture(axes: Axes, pixels: Any) -> None:
    """Show an image (C, H, W) with one or three channels."""
    axes.imshow(pixels.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)


def _evenly(names: list, most: int) -> list:
    """Return at most this many of the names, evenly spaced from the first to the last."""
    if len(names) <= most:
        return names
    return [names[round(index * (len(names) - 1) / (most - 1))] for index in range(most)]


_DRAWN: dict[type, Any] = {
    CKA: _cka,
    Confusion: _confusion,
    Convergence: _convergence,
    Costs: _costs,
    Depths: _depths,
    Features: _features,
    Labels: _labels,
    Neighbours: _neighbours,
    Saliency: _saliency,
}
"""Drawing function for each kind of results."""
