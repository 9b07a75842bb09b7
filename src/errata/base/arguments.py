"""Checks of argument types: a text in place of a fact, say, gives a one-line error that tells how to make a fact."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from errata.base.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])

# How to come by an object of each class.
HOW = {
    "Model": "load one with errata.load_model('atlas')",
    "Fact": "make one with errata.Fact('The Space Needle', '{} is located in', 'Seattle')",
    "Rewrite": "make one with errata.Fact('The Space Needle', '{} is located in').rewrite('Paris')",
    "Edit": "make one with errata.rome(model, rewrite), or read one with errata.Edit.load(path)",
    "Editor": "make one with errata.editor(model, 'rome')",
    "Record": "read records with errata.read_records(path)",
    "CausalTrace": "make one with errata.trace(model, fact), or read several with errata.load_traces(path)",
    "SecondMoment": "make one with errata.second_moments(model, [layer], corpus)[layer]",
    "TraceConfig": "make one with errata.TraceConfig(samples=5), or give its settings by name",
    "RomeConfig": "make one with errata.RomeConfig(layer=4), or give its settings by name",
    "RankOne": "changes of weights are RankOne, LowRank or Dense, of errata.edits",
}


def checked(**kinds: str | list[str]) -> Callable[[F], F]:
    """Decorator that checks the classes of a function's arguments; `kinds` maps argument names to class names.

    Args:
        **kinds: for each argument the name of its class, or several, as in "Record|ZsreRecord"; in a list if it is a
            list of such. "callable" stands for anything that can be called. None passes where it is the default.

    Raises:
        ConfigError: (the function) if one is of another class.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError:  # told by the call itself
                return function(*args, **kwargs)
            for name, kind in kinds.items():
                if name in given and not (given[name] is None and signature.parameters[name].default is None):
                    require(given[name], kind, f"{function.__qualname__}: {name}")
            return function(*args, **kwargs)

        return cast(F, wrapper)

    return decorate


def require(value: Any, kind: str | list[str], name: str) -> None:
    """Check that an argument is of a kind, in the notation of `checked`.

    Raises:
        ConfigError: if it is not.
    """
    if isinstance(kind, str):
        if not _is(value, kind):
            raise ConfigError(f"{name} is {_described(value)}; it must be of class {_named(kind)}: {_how(kind)}")
        return
    (each,) = kind
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable) or _is(value, each):
        raise ConfigError(f"{name} is {_described(value)}; it must be a list of {_named(each)}: {_how(each)}")
    for index, one in enumerate(value if isinstance(value, (list, tuple)) else ()):
        if not _is(one, each):
            raise ConfigError(f"{name}[{index}] is {_described(one)}; it must be of class {_named(each)}: {_how(each)}")


def _is(value: Any, kind: str) -> bool:
    wanted = kind.split("|")
    if "callable" in wanted and callable(value):
        return True
    return any(cls.__name__ in wanted for cls in type(value).__mro__)


def _named(kind: str) -> str:
    return " or ".join(one for one in kind.split("|") if one not in ("callable", "dict"))


def _how(kind: str) -> str:
    return HOW[kind.split("|")[0]]


def _described(value: Any) -> str:
    if value is None:
        return "None"
    text = repr(value) if isinstance(value, (str, int, float)) else ""
    text = text if len(text) <= 40 else f"{text[:37]}..."
    return f"a {type(value).__name__}{f', {text}' if text else ''}"
