"""Deferred signals: Ctrl-C takes effect at the next safe moment, never in the middle of a change.

`unbroken` makes context managers that change a model for the time of a block. A signal that arrives while one begins or
ends waits until that is done; inside the block, signals arrive as usual. `uninterrupted` does so for a whole function.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_AGAIN = 0.005  # seconds after which a signal that waits is tried again
_waiting: deque[int] = deque()


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], None]]:
    """Yield a function to call wherever stopping is safe: it raises KeyboardInterrupt if Ctrl-C was pressed.

    A second Ctrl-C stops at once. Outside the main thread, where signals do not arrive, the function never raises.
    """
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def stop_here() -> None:
        if pressed:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield stop_here
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop_here
    finally:
        signal.signal(signal.SIGINT, before)


class _Shield:
    """Handlers of signals in front of those that are there, which let a signal wait while protected code runs."""

    def __init__(self) -> None:
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._up = False

    def raise_(self) -> None:
        """Put the handlers in place. Nothing happens outside the main thread, where signals do not arrive."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._up = True
        for name in ("SIGINT", "SIGTERM"):
            number = getattr(signal, name, None)  # Windows has fewer
            handler = None if number is None else signal.getsignal(number)
            if number is not None and callable(handler):
                self._before[number] = handler
                signal.signal(number, self._handle)

    def lower(self) -> None:
        """Put back the handlers that were there, and deliver what has waited."""
        if not self._up or threading.current_thread() is not threading.main_thread():
            return
        for number, handler in reversed(self._before.items()):  # the first, SIGINT, waits until the others are back
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        self._up = False  # a handler that could not be put back, for another's lies on it, passes everything on
        for _ in range(len(_waiting)):
            _deliver(signal.raise_signal)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._up and _is_protected(frame):
            _waiting.append(number)
            _thread.start_new_thread(_try_again, ())
        else:
            self._before[number](number, frame)


def _try_again() -> None:
    time.sleep(_AGAIN)
    _deliver(_thread.interrupt_main)


def _deliver(send: Callable[..., None]) -> None:
    with contextlib.suppress(IndexError):  # it has been delivered
        send(_waiting.popleft())


def _is_protected(frame: FrameType | None) -> bool:
    """Whether a signal would arrive while something begins or ends: in our code, or in contextlib, which calls it."""
    if frame is not None and frame.f_code.co_filename == contextlib.__file__:
        return True
    while frame is not None:
        if frame.f_code in _PROTECTED:
            return True
        frame = frame.f_back
    return False


class _Unbroken(contextlib.AbstractContextManager[T], Generic[T]):
    """A context manager that no signal cuts short while it begins or ends."""

    def __init__(self, manager: contextlib.AbstractContextManager[T]):
        self._manager = manager
        self._shield = _Shield()  # apart, so that the handlers of signals keep nothing else alive

    def __enter__(self) -> T:
        self._shield.raise_()
        try:
            return self._manager.__enter__()
        except BaseException:
            self._shield.lower()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        try:
            return self._manager.__exit__(kind, error, trace)
        finally:
            self._shield.lower()


def unbroken(function: Callable[P, Iterator[T]]) -> Callable[P, contextlib.AbstractContextManager[T]]:
    """`contextlib.contextmanager` in which signals wait while the code before and after the `yield` runs."""
    manager = contextlib.contextmanager(function)

    @functools.wraps(function)
    def made(*args: P.args, **kwargs: P.kwargs) -> contextlib.AbstractContextManager[T]:
        return _Unbroken(manager(*args, **kwargs))

    return made


def uninterrupted(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: signals wait until the function has returned."""

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        shield = _Shield()
        shield.raise_()
        try:
            return function(*args, **kwargs)
        finally:
            shield.lower()

    _PROTECTED.add(run.__code__)
    return functools.wraps(function)(run)


_PROTECTED = {
    function.__code__ for function in (_Unbroken.__enter__, _Unbroken.__exit__, _Shield.raise_, _Shield.lower)
}


@unbroken
def attached(*registrations: Callable[[], Any]) -> Iterator[None]:
    """Context in which hooks are attached: each call registers one and returns a handle with `remove`."""
    with contextlib.ExitStack() as stack:
        for register in registrations:
            stack.callback(register().remove)
        yield
