"""Display of text from files and users: control characters escaped, long texts shortened."""

from __future__ import annotations

import sys
import unicodedata

LONGEST = 2000  # characters of a message

_KEPT = "\n\t"
_HIDDEN = {"Cc", "Cs"}  # control characters, by which a terminal can be steered; halves of characters
_DIRECTIONS = {chr(code) for code in (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def printable(text: str) -> str:
    """Text with an escape, such as \\x1b, for each control character but line ends and tabs, and for each that turns
    the direction of writing."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(sign) if _steers(sign) else sign for sign in text)


def is_torn(text: str) -> bool:
    """Whether a text has lone surrogates, which stand for bytes that are not UTF-8."""
    return any("\udc80" <= character <= "\udcff" for character in text)


def abridged(text: str, longest: int = LONGEST) -> str:
    """A text, with its middle replaced by a note of its length if it is longer than `longest`."""
    if len(text) <= longest:
        return text
    head, tail = longest * 3 // 4, longest // 5
    return f"{text[:head]} … [{len(text) - head - tail:,} characters left out] … {text[-tail:]}"


def shown(text: str) -> str:
    """A message for display: `abridged` and `printable`."""
    return printable(abridged(text))


def unformulated(text: str) -> str:
    """A name for a CSV cell, with an apostrophe in front if a spreadsheet would read it as a formula."""
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") or text[:1] in ("\t", "\r") else text


def tell(text: object, *, err: bool = False) -> None:
    """Print a line on standard output or standard error, made `printable`."""
    print(printable(str(text)), file=sys.stderr if err else sys.stdout)


def _steers(sign: str) -> bool:
    return sign not in _KEPT and (unicodedata.category(sign) in _HIDDEN or sign in _DIRECTIONS)


def _escape(sign: str) -> str:
    return sign.encode("unicode_escape", "surrogatepass").decode("ascii")
