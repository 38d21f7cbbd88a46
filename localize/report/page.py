"""The page: a table of the runs, and for each what it has learned by depth, what its step needs, and how it was set.

Numbers are in tables beside the pictures. Pictures are drawn in colours for a white page; on a screen that is set to
dark, the style replaces them.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import localize
from localize import methods
from localize.analysis.seeds import grouped, mean
from localize.ir import LocalLoss, Plan
from localize.pictures.memory import COLOURS, memory_svg
from localize.pictures.svg import DARK, FAINT, HEAD, INK, MUTED, PAPER, REACH, TRUNK
from localize.report.analyses import Analysed
from localize.report.charts import DARK_RAMP, DASHES, MOST_NAMES, Line, depth_colour, line_chart, strip
from localize.report.markup import Html, element, joined
from localize.report.step import Step
from localize.report.training import Training
from localize.train import runs
from localize.train.metrics import LossMetrics

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser may load for the page: nothing."""


def page(trainings: Sequence[Training], steps: Sequence[Step], analyses: Sequence[Analysed] = ()) -> str:
    """Return the page about runs, the step of each, and analyses of them, as HTML text."""
    title = f"{len(trainings)} training runs" if len(trainings) > 1 else f"Training run {trainings[0].name}"
    parts = [element("h1", title), _runs(trainings, steps), *_together(trainings), *_analyses(analyses)]
    for number, (training, step) in enumerate(zip(trainings, steps, strict=True), start=1):
        parts.append(element("section", *_run(training, step), id=f"run-{number}"))
    parts.append(element("footer", f"Written by localize {localize.__version__}."))
    head = joined(
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        Html('<meta name="color-scheme" content="light dark">'),
        element("title", f"{title}, localize"),
        element("style", Html(_style())),
    )
    body = element("body", element("main", *parts))
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n{body}\n</html>\n'


# ------------------------------------------------------------------------------------------------------------ runs


def _runs(trainings: Sequence[Training], steps: Sequence[Step]) -> Html:
    names = ("model", "method", "data", "seed", "epochs", "parameters", "of heads", "test accuracy", "best (epoch)")
    rows = []
    for number, (training, step) in enumerate(zip(trainings, steps, strict=True), start=1):
        config, last = training.config, training.epochs[-1] if training.epochs else None
        known = step.plan is not None
        rows.append(
            [
                element("a", training.name, href=f"#run-{number}"),
                training.recipe.model or "",
                _method(training),
                config.data,
                str(config.seed),
                _progress(training),
                f"{step.trunk_parameters:,}" if known else "?",
                f"{step.training_parameters - step.trunk_parameters:,}" if known else "?",
                _percent(last.test_accuracy if last else None),
                f"{_percent(training.best.test_accuracy)} ({training.best.epoch})" if last else "",
                "" if training.images_per_second is None else f"{training.images_per_second:,.0f}",
                "" if training.seconds is None or not last else _duration(training.seconds),
            ]
        )
    caption = "Test accuracy is that of the model's own output in the last epoch; time and images per second are of "
    caption += "loading and training, without evaluation."
    return _table(["run", *names, "images/s", "time"], rows, caption=caption, words=5)


def _method(training: Training) -> str:
    """Return the method, with the options that are not its defaults."""
    recipe = training.recipe
    kind: Any = methods.get(recipe.method)  # a dataclass
    defaults = {item.name: item.default for item in dataclasses.fields(kind)}
    told = [f"{name} {value}" for name, value in recipe.options.items() if value != defaults.get(name)]
    told += [f"loss {recipe.loss['name']}" if "name" in recipe.loss else "loss cross-entropy"] if recipe.loss else []
    told += [f"{name} {value}" for name, value in recipe.loss.items() if name not in ("name", "weights")]
    told += ["class weights"] if recipe.loss.get("weights") else []
    return ", ".join([recipe.method, *told])


def _progress(training: Training) -> str:
    done, asked = len(training.epochs), training.config.epochs
    if not training.finished:
        return f"{done} of {asked}, unfinished"
    return str(done) if done == asked else f"{done} of {asked}"


def _together(trainings: Sequence[Training]) -> Iterable[Html]:
    """Yield the runs' own outputs in one picture, where there is more than one to show; seeds of one recipe are one."""
    shown = {training.name: training for training in trainings if training.epochs}
    if len(shown) < 2:
        return
    groups = grouped({name: training.recipe for name, training in shown.items()})
    if len(groups) == len(shown):
        groups = {name: (name,) for name in shown}
    looks = {group: look(index) for index, group in enumerate(groups)}
    lines = []
    for group, members in groups.items():
        values: dict[float, list[float]] = {}
        for name in members:
            for epoch in shown[name].epochs:
                values.setdefault(epoch.epoch, []).append(epoch.test_accuracy)
        lines.append(_averaged(group, values, looks[group]))
    told = "; ".join(f"{line.name} {_percent(line.points[-1][1])}" for line in lines)
    label = f"Test accuracy of the runs over epochs. In their last epochs: {told}."
    title = "Test accuracy of the runs"
    over = line_chart(lines, title=title, across="epoch", upward="own output", label=label, share=True)
    yield _beside(_figure(over), *_depths_together(groups, shown, looks))
    several = {group: members for group, members in groups.items() if len(members) > 1}
    if several:
        told = "; ".join(f"{group}: {', '.join(members)}" for group, members in several.items())
        yield element("p", f"Lines are means over seeds, bands reach from the lowest to the highest. {told}.")
    left = [name for name, training in shown.items() if len(_by_depth(training)) < 2]
    if left:
        yield element("p", f"Without class scores at two depths or more, and so not shown by depth: {', '.join(left)}.")


def look(index: int) -> Line:
    """Return how the line of a run looks: the first twenty differ in colour or dash."""
    palette = (INK, *COLOURS[1:])
    return Line("", (), palette[index % len(palette)], width=1.8, dash=DASHES[index % len(DASHES)])


def _averaged(name: str, values: Mapping[float, Sequence[float]], look: Line) -> Line:
    """Return the mean of values at each place, and their range where some place has several."""
    points = tuple((x, mean(found)) for x, found in sorted(values.items()))
    several = any(len(found) > 1 for found in values.values())
    band = tuple((x, min(found), max(found)) for x, found in sorted(values.items())) if several else ()
    return dataclasses.replace(look, name=name, points=points, band=band)


def _by_depth(training: Training) -> list[tuple[float, float]]:
    """Return depth in % and test accuracy of every loss with class scores, in the last epoch."""
    losses = training.epochs[-1].segments
    deepest = max(loss.route[1] for loss in losses) or 1
    return [(100 * one.route[1] / deepest, one.test_accuracy) for one in losses if one.test_accuracy is not None]


def _depths_together(
    groups: Mapping[str, Sequence[str]], shown: Mapping[str, Training], looks: Mapping[str, Line]
) -> Iterable[Html]:
    """Yield the test accuracy of the runs' losses by depth, in the last epoch of each; a run looks as in ``looks``."""
    lines = []
    for group, members in groups.items():
        values: dict[float, list[float]] = {}
        for name in members:
            for depth, share in _by_depth(shown[name]):
                values.setdefault(depth, []).append(share)
        if len(values) > 1:
            lines.append(dataclasses.replace(_averaged(group, values, looks[group]), dots=len(values) < 20))
    if lines:
        title = "Test accuracy by depth, in the last epoch of each run"
        label = f"{title}: {', '.join(line.name for line in lines)}."
        across = "segment in which the loss ends, in % of all"
        yield _figure(line_chart(lines, title=title, across=across, upward="local losses", label=label, share=True))


def _analyses(found: Sequence[Analysed]) -> Iterable[Html]:
    """Yield the analyses of the runs: numbers by depth as pictures, and all as tables."""
    for one in found:
        yield element("h2", f"Analysis: {one.name}")
        pictures = []
        for quantity, values in one.by_depth.items():
            lines = [_averaged(group, by, look(index)) for index, (group, by) in enumerate(values.items())]
            lines = [dataclasses.replace(line, dots=len(line.points) < 20) for line in lines]
            told = f"{quantity} by depth: {', '.join(values)}."
            across = "depth, in % of the segments"
            pictures.append(_figure(line_chart(lines, title=quantity, across=across, upward="", label=told)))
        if pictures:
            yield _beside(*pictures)
        told = one.file
        if len(one.rows) < one.count:
            told += f": the first {len(one.rows)} of {one.count} lines"
        yield _table(one.header, one.rows, caption=told, words=one.words)


# --------------------------------------------------------------------------------------------------------- one run


def _run(training: Training, step: Step) -> Iterable[Html]:
    yield element("h2", training.name)
    yield element("p", _headline(training, step))
    if training.epochs:
        yield element("h3", "Over epochs")
        if len(training.epochs) > 1:
            yield _beside(_figure(_curves(training, "test_accuracy")), _figure(_curves(training, "train_loss")))
        yield _epochs(training)
        yield element("h3", f"By depth, in epoch {training.epochs[-1].epoch}")
        yield _beside(*_depths(training))
    if step.plan is not None:
        yield element("h3", "Ownership")
        yield _figure(strip(step.plan))
        yield _owners(step.plan)
    yield element("h3", "Memory over one step")
    if step.memory:
        title = f"{training.recipe.model}, {training.config.batch_size} images"
        yield _figure(memory_svg(step.memory, title))
        yield _footprints(step)
    else:
        yield element("p", f"Not predicted: {step.refused}")
    yield element("h3", "Settings")
    yield element("p", "What the run was asked to do; ", element("code", "localize train -r"), " takes it again.")
    yield element("pre", training.text, tabindex="0")


def _headline(training: Training, step: Step) -> str:
    config = training.config
    told = [f"{training.recipe.model} by {_method(training)} on {config.data}, seed {config.seed}"]
    if step.plan is not None:
        told.append(f"{_count(len(step.plan.segments), 'segment')}, {_count(len(step.plan.losses), 'loss', 'losses')}")
    done = f"{len(training.epochs)} of {config.epochs} epochs"
    if training.finished:
        told.append(f"finished after {done}")
    else:
        told.append(f"unfinished: the rest is about {done}" if training.epochs else "unfinished: no epoch yet")
    return "; ".join(told) + "."


def _curves(training: Training, what: str) -> str:
    """Return the picture of a quantity over epochs: a line for each local loss, and the model's own output on top."""
    share = what == "test_accuracy"
    local = training.epochs[-1].segments[:-1]
    found: dict[str, list[tuple[float, float]]] = {loss.name: [] for loss in local}
    for epoch in training.epochs:
        for loss in epoch.segments:
            value = getattr(loss, what)
            if loss.name in found and value is not None:
                found[loss.name].append((epoch.epoch, value))
    lines = []
    for index, (name, points) in enumerate(found.items()):
        if points:
            lines.append(Line(name, tuple(points), depth_colour(index, len(found) + 1)))
    own = tuple((epoch.epoch, getattr(epoch, what)) for epoch in training.epochs)
    lines.append(Line("the model's own output", own, INK, width=2.8))
    title = "Test accuracy" if share else "Training loss"
    told = f"{title} over {len(own)} epochs: {_count(len(lines) - 1, 'local loss', 'local losses')} and the model's "
    told += f"own output, which ends at {_percent(own[-1][1]) if share else f'{own[-1][1]:.4g}'}."
    scale = f"{local[0].name} to {local[-1].name}, the deepest" if len(lines) > MOST_NAMES else ""
    upward = "accuracy" if share else "loss"
    return line_chart(lines, title=title, across="epoch", upward=upward, label=told, share=share, scale=scale)


def _epochs(training: Training) -> Html:
    names = ["epoch", "training loss", "training accuracy", "test accuracy", "worst local loss", "lr", "images/s"]
    rows = []
    for epoch in training.epochs:
        scored = [loss for loss in epoch.segments if loss.test_accuracy is not None]
        worst = min(scored, key=lambda loss: loss.test_accuracy or 0.0) if len(scored) > 1 else None
        rows.append(
            [
                str(epoch.epoch),
                f"{epoch.train_loss:.4f}",
                _percent(epoch.train_accuracy),
                _percent(epoch.test_accuracy),
                f"{_percent(worst.test_accuracy)} {worst.name}" if worst else "",
                f"{epoch.lr:.3g}",
                f"{epoch.images_per_second:,.0f}",
            ]
        )
    return _table(
        names, rows, caption=f"Epochs of the run; every loss in every epoch: {runs.SEGMENTS} in its folder", words=1
    )


def _depths(training: Training) -> Iterable[Html]:
    """Yield the accuracy of every local loss in the last epoch: a picture, where there are several, and a table."""
    last = training.epochs[-1]
    lines = []
    for name, what, colour in (("test", "test_accuracy", TRUNK), ("training", "train_accuracy", HEAD)):
        values = enumerate(getattr(loss, what) for loss in last.segments)
        points = tuple((index, value) for index, value in values if value is not None)
        if points:
            lines.append(Line(name, points, colour, width=1.8, dots=True))
    if lines and len(last.segments) > 1:
        own = tuple((index, last.test_accuracy) for index in (0, len(last.segments) - 1))
        lines.append(Line("test, the model's own output", own, MUTED, dash="6 4"))
        scores = [loss.test_accuracy for loss in last.segments if loss.test_accuracy is not None]
        told = f"Accuracy of {len(last.segments)} losses by depth in epoch {last.epoch}."
        if scores:
            told += f" Test accuracy: {_percent(min(scores))} to {_percent(max(scores))}, "
            told += f"median {_percent(statistics.median(scores))}."
        across = "local loss, from the images to the output"
        yield _figure(line_chart(lines, title="Accuracy by depth", across=across, upward="", label=told, share=True))
    names = ["loss", "segments", "training loss", "training accuracy", "test accuracy"]
    rows = [[loss.name, _route(loss), _loss(loss.train_loss), *_accuracies(loss)] for loss in last.segments]
    yield _table(names, rows, caption=f"Local losses in epoch {last.epoch}", words=2)


def _loss(value: float | None) -> str:
    return "left out" if value is None else f"{value:.4f}"


def _route(loss: LossMetrics) -> str:
    first, last = loss.route
    return str(first) if first == last else f"{first} to {last}"


def _accuracies(loss: LossMetrics) -> Iterable[str]:
    for share in (loss.train_accuracy, loss.test_accuracy):
        yield "no scores" if share is None else _percent(share)


def _owners(plan: Plan) -> Html:
    rows = []
    scheduled = any(map(plan.schedule_of, plan.segments.segments))
    for loss in plan.losses:
        blocks = {role: _names(plan, loss, role) for role in ("segment", "head")}
        rest = [name for name in loss.reach if plan.block(name).role not in blocks]
        segment = plan.segments.segments[loss.route.stop]
        count = sum(plan.block(name).size for name in loss.reach)
        told = [plan.schedule_of(segment) or "as usual"] if scheduled else []
        rows.append(
            [loss.name, segment.ends_at, _short(blocks["segment"]), _short(blocks["head"] + rest), *told, f"{count:,}"]
        )
    schedule = ["schedule"] if scheduled else []
    names = ["loss", "reads the features of", "trains segments", "trains besides", *schedule, "parameters"]
    return _table(
        names,
        rows,
        caption="Declared reach of every loss: the blocks that it trains, and no others",
        words=len(names) - 1,
    )


def _names(plan: Plan, loss: LocalLoss, role: str) -> list[str]:
    return [name for name in loss.reach if plan.block(name).role == role]


def _short(names: Sequence[str]) -> str:
    """Return names, those in the middle of many left out."""
    return ", ".join(names) or "none" if len(names) <= 4 else f"{names[0]}, {names[1]}, ..., {names[-1]} ({len(names)})"


def _footprints(step: Step) -> Html:
    base = next(iter(step.memory.values()))
    rows = [
        [
            name,
            f"{found.peak / 2**20:,.1f}",
            f"{found.peak / base.peak:.1%}",
            f"{found.saved / 2**20:,.1f}",
            f"{found.resident / 2**20:,.1f}",
            f"{found.macs / base.macs:.2f} x",
        ]
        for name, found in step.memory.items()
    ]
    names = ["step", "peak, MiB", "share", "kept for backward, MiB", "between steps, MiB", "multiply-adds"]
    caption = "Live tensors (parameters, gradients, momentum of SGD, batch, activations), predicted from the text"
    return _table(names, rows, caption=caption, words=1)


# ----------------------------------------------------------------------------------------------------------- pieces


def _figure(picture: str) -> Html:
    return element("figure", Html(picture))


def _beside(*pieces: Html) -> Html:
    return element("div", *pieces, class_="beside")


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str, words: int) -> Html:
    """Return a table; its first ``words`` columns hold text, the others numbers."""
    kinds = ["word" if index < words else "number" for index in range(len(names))]
    head = [element("th", name, scope="col", class_=kind) for name, kind in zip(names, kinds, strict=True)]
    lines = []
    for first, *cells in rows:
        told = [element("td", cell, class_=kind) for cell, kind in zip(cells, kinds[1:], strict=True)]
        lines.append(element("tr", element("th", first, scope="row", class_=kinds[0]), *told))
    body = element("thead", element("tr", *head)), element("tbody", *lines)
    table = element("table", element("caption", caption), *body)
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.2f} h"


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def _style() -> str:
    dark = "".join(
        f'svg [fill="{light}"]{{fill:{other}}}svg [stroke="{light}"]{{stroke:{other}}}'
        for light, other in (DARK | DARK_RAMP).items()
    )
    names = {"ink": INK, "muted": MUTED, "faint": FAINT, "paper": PAPER, "shade": REACH, "link": TRUNK}
    day = ";".join(f"--{name}:{colour}" for name, colour in names.items())
    night = ";".join(f"--{name}:{DARK[colour]}" for name, colour in names.items())
    return f"""
:root{{{day}}}
body{{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 Helvetica,Arial,"Liberation Sans",sans-serif}}
main{{max-width:1092px;margin:0 auto;padding:24px}}
h1{{font-size:24px}}h2{{font-size:20px;margin-top:48px;border-top:1px solid var(--faint);padding-top:24px}}
h3{{font-size:16px;margin:28px 0 8px}}h1,h2{{overflow-wrap:anywhere}}
a{{color:var(--link)}}footer{{margin-top:48px;color:var(--muted)}}
figure{{margin:12px 0;overflow-x:auto}}svg{{max-width:100%;height:auto}}
.beside{{display:flex;flex-wrap:wrap;gap:0 20px;align-items:flex-start}}.beside>*{{max-width:100%}}
.scroll{{max-height:360px;overflow:auto;margin:12px 0}}
table{{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}}
caption{{text-align:left;color:var(--muted);padding-bottom:4px}}
th,td{{padding:3px 10px 3px 0;border-bottom:1px solid var(--faint);vertical-align:top}}
thead th{{position:sticky;top:0;background:var(--paper)}}tbody th{{font-weight:normal}}
.word{{text-align:left}}.number{{text-align:right;white-space:nowrap}}
pre{{background:var(--shade);border:1px solid var(--faint);padding:12px;overflow:auto;font-size:12.5px}}
@media screen and (prefers-color-scheme:dark){{:root{{{night}}}{dark}}}
@media print{{.scroll,figure,pre{{max-height:none;overflow:visible}}pre{{white-space:pre-wrap}}
figure,tr{{break-inside:avoid}}h2,h3{{break-after:avoid}}main{{max-width:none;padding:0}}thead th{{position:static}}
table{{font-size:9.5px}}.number{{white-space:normal}}.beside{{flex-wrap:nowrap}}.beside>*{{flex:1 1 0;min-width:0}}}}
"""
