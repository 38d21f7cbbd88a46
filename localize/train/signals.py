"""Ctrl-C and SIGTERM during a run: noted when they arrive, and acted on after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def noticing() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGINT or SIGTERM has arrived.

    Only the first signal is noted; a second one has its usual effect. An ignored signal stays ignored. Outside the main
    thread, which alone receives signals, nothing is noted.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {one: signal.getsignal(one) or signal.SIG_DFL for one in (signal.SIGINT, signal.SIGTERM)}
    before = {one: handler for one, handler in before.items() if handler != signal.SIG_IGN}

    def give_back() -> None:
        for one, handler in before.items():
            signal.signal(one, handler)

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        give_back()
        # Loading processes may have received the same signal, and torch would then raise in the middle of a step.
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL) or signal.SIG_DFL

    for one in tuple(before):
        signal.signal(one, note)
    try:
        yield lambda: bool(came)
    finally:
        give_back()
