"""Text in figures: tokens and titles with any characters.

Matplotlib reads dollar signs as mathematics, warns of characters that its fonts lack, and shows white space as nothing.
Here each becomes something readable.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.text import Text

_LABEL_LENGTH = 18  # characters of a token's label
_FRACTION = re.compile(r"\[\d+/\d+\]$")  # of a character, as readable tokens end in it


def plain(text: Text) -> None:
    """Text in which matplotlib does not read dollar signs and backslashes as mathematics."""
    text.set_parse_math(False)
    text.set_usetex(False)


def visible(text: str, glyphs: set[int]) -> str:
    """The text with signs or escapes for characters that show nothing or that the fonts do not have."""
    pieces = []
    for character in text:
        if character == "\n":
            pieces.append(_sign("↵", "\\n", glyphs))
        elif ord(character) in glyphs and (character == " " or unicodedata.category(character)[0] not in "CZ"):
            pieces.append(character)
        else:
            pieces.append(f"\\u{{{ord(character):x}}}")
    if pieces and unicodedata.combining(pieces[0][0]):  # an accent without its letter
        pieces.insert(0, _sign("◌", " ", glyphs))
    return "".join(pieces)


def probability(answer: str | None, glyphs: set[int]) -> str:
    """Label of an answer's probability: p(Seattle)."""
    name = (answer or "").strip() or answer or "answer"
    return f"p({visible(name, glyphs)})"


def token_labels(tokens: Sequence[str], subject: tuple[int, int], glyphs: set[int]) -> list[str]:
    """Tokens as labels of rows: spaces visible, cut where they are long, the subject's starred."""
    first, last = subject
    return [_label(token, glyphs) + "*" * (first <= row <= last) for row, token in enumerate(tokens)]


def font_glyphs() -> set[int]:
    """Code points that matplotlib can draw with the fonts that it is set to, fall-backs included."""
    from matplotlib import font_manager, rcParams

    paths = []
    for family in rcParams["font.family"]:
        properties = font_manager.FontProperties(family=[family])
        with contextlib.suppress(ValueError):  # not installed: matplotlib passes over it too
            paths.append(font_manager.findfont(properties, fallback_to_default=False))
    paths = paths or [font_manager.findfont("DejaVu Sans")]  # its last resort, which it brings along
    return {code for path in paths for code in font_manager.get_font(path).get_charmap()}


def _label(token: str, glyphs: set[int]) -> str:
    fraction = _FRACTION.search(token)
    ending = fraction[0] if fraction else ""  # never cut off: it tells rows apart
    space, ellipsis = _sign("␣", "_", glyphs), _sign("…", "...", glyphs)
    room = _LABEL_LENGTH - len(ending)
    text = token.removesuffix(ending).replace(" ", space)
    if len(visible(text, glyphs)) > room:
        text = text[:room]
        while len(visible(text, glyphs)) > room - len(ellipsis):
            text = text[:-1]
        text += ellipsis
    return visible(text, glyphs) + ending


def _sign(sign: str, otherwise: str, glyphs: set[int]) -> str:
    return sign if ord(sign) in glyphs else otherwise
