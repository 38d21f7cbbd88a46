"""A page about training runs: what their folders say, and what the step of each needs, as one HTML file.

The page is self-contained: it loads no script, font, picture or style.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from localize.report.analyses import analysed
from localize.report.page import page
from localize.report.step import predict_all
from localize.report.training import read

__all__ = ["report"]


def report(
    folders: Sequence[str],
    *,
    memory: bool = True,
    analyses: str | None = None,
    tell: Callable[[str], None] = lambda name: None,
    trust_code: bool = False,
) -> str:
    """Return the page about runs, as HTML text.

    Args:
        folders: of runs, finished or not, in the order of the page.
        memory: predict the memory over one step too, which takes longest.
        analyses: a folder that ``localize analyze -o`` has written, whose numbers are shown.
        tell: called with the name of what is being predicted.
        trust_code: run the files of code that the folders name, see :mod:`localize.recipes.trust`.

    Raises:
        MissingError: a folder is not that of a run, or ``analyses`` holds none.
        LocalizeError: its recipe or its metrics cannot be read.
    """
    trainings = [read(folder, trust_code=trust_code) for folder in dict.fromkeys(folders)]
    found = [] if analyses is None else analysed(analyses)
    return page(trainings, predict_all(trainings, memory=memory, tell=tell), found)
