"""Collection of second moments C = E[k kᵀ] over the tokens of a corpus, for all requested layers in one pass.

Every token counts once; padding does not count. Texts of similar length share a batch, so that there is little padding.
The forward pass stops at the highest requested layer, before its down-projection; keys are added to the sums
immediately and not kept.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from errata.base.arguments import checked
from errata.base.autocast import without_autocast
from errata.base.errors import ConfigError, StaleStatistics
from errata.base.interrupt import deferred_interrupt
from errata.models.model import Batch, Model
from errata.passes.hooks import Patch, hooked
from errata.statistics.corpus import Corpus, TextDigest, require_text
from errata.statistics.fingerprint import fingerprints
from errata.statistics.second_moment import SecondMoment
from errata.statistics.sums import Sums

MAX_TOKENS = 100_000
MAX_LENGTH = 1024  # of a text, unless more is asked for: what the models of the paper read at most
WHICH = ("all", "not-first", "not-special")
CHECKPOINT_SECONDS = 40.0

# Tokens in a forward pass, padding included; and texts are sorted by length within so many tokens.
_BATCH, _WINDOW = 2048, 32 * 2048
# No tokenizer needs so many characters a token; a text is cut there before it is tokenized.
_CHARACTERS = 64

Progress = Callable[[int, int], None]  # (tokens read, tokens wanted)
_Flags = Callable[[Sequence[int]], list[bool]]


@checked(model="Model")
@without_autocast
def collect(
    model: Model,
    layers: Iterable[int],
    texts: Corpus | Iterable[str],
    max_tokens: int = MAX_TOKENS,
    max_length: int | None = None,
    *,
    which: str = "all",
    progress: Progress | None = None,
    checkpoint: str | Path | None = None,
) -> dict[int, SecondMoment]:
    """Second moments of the keys of some layers over a corpus.

    Texts are read in order until `max_tokens` tokens are reached; the last one is cut to fit. Memory: about 9·d_mlp²
    bytes for each layer, 50·d_mlp² more at the end, and the memory of a forward pass of 2,048 tokens.

    Args:
        layers: 0-based layers.
        texts: a `Corpus`, or any iterable of texts, which is read once and as far as needed.
        max_tokens: maximum number of counted tokens.
        max_length: cut every text to this many tokens; None: to what the model can read, at most 1024.
        which: which tokens count: "all"; "not-first": all except the first of every text, whose keys often have another
            size; "not-special": all except special tokens, such as a start token.
        progress: called after every batch with (tokens that count so far, `max_tokens`).
        checkpoint: a file from which a stopped run continues; needs a `Corpus`. It is written every 40 seconds, after a
            batch, and on Ctrl-C; the caller removes it. A resumed run gives the result of an uninterrupted one, bit for
            bit.

    Raises:
        ConfigError: if a layer is not there, a number is out of range, or the texts have no tokens or are not texts.
        StaleStatistics: if a checkpoint was started with other texts although the corpus has the same fingerprint.
        OutputError: if the checkpoint cannot be written; one that was there stays.
    """
    wanted = checked_layers(model, layers)
    max_length = checked_length(model, max_tokens, max_length, which)
    if isinstance(texts, str):
        raise ConfigError("texts is one string, whose letters would be the texts: put it in a list")
    place = Path(checkpoint) if checkpoint is not None else None
    prints = None
    if isinstance(texts, Corpus):
        prints = fingerprints(model, wanted, texts.name, texts.digest, max_tokens, max_length, which)
    elif place:
        raise ConfigError("a checkpoint needs a Corpus, whose digest is known: use Corpus.of or Corpus.open")
    sums = Sums(wanted, model.d_mlp, model.device)
    consumed = TextDigest()
    flags = _flags(model, which)
    batches = _batches(_rows(model, texts, max_tokens, max_length, flags, consumed))
    if place and prints:
        sums.resume(place, prints)
        _skip(batches, sums, place)
        if sums.batches and progress is not None:
            progress(sum(sums.counts), max_tokens)

    def keep() -> None:
        if place and prints:
            sums.save(place, prints)

    kept = time.monotonic()
    with deferred_interrupt() as stop_here:
        for rows in batches:
            counted = [flags(row) for row in rows]
            _add(model, sums, model.batch(rows), counted)
            sums.close_batch(sum(map(sum, counted)), _trail(sums.trail, rows))
            if progress is not None:
                progress(sum(sums.counts), max_tokens)
            try:
                stop_here()
            except KeyboardInterrupt:
                keep()
                raise
            if time.monotonic() - kept >= CHECKPOINT_SECONDS:
                keep()
                kept = time.monotonic()
    if not sums.batches:
        raise ConfigError("the corpus has no tokens, so there are no keys to average. Give at least one text")
    if prints is None:
        prints = fingerprints(model, wanted, "texts", consumed.hex, max_tokens, max_length, which)
    return {layer: sums.moment(layer, prints[layer]) for layer in wanted}


def checked_length(model: Model, max_tokens: int, max_length: int | None, which: str = "all") -> int:
    """The length to which texts are cut.

    Raises:
        ConfigError: if a number is out of range, or `which` is not a choice of tokens.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}: at least one token is needed")
    if which not in WHICH:
        raise ConfigError(f"which is {which!r}, which is not a choice of tokens: choose one of {', '.join(WHICH)}")
    if max_length is None:
        return min(model.max_length, MAX_LENGTH)
    if not 1 <= max_length <= model.max_length:
        raise ConfigError(f"max_length is {max_length}: {model.name} reads 1 to {model.max_length} tokens")
    return max_length


def checked_layers(model: Model, layers: Iterable[int]) -> list[int]:
    """Layers in order, each once.

    Raises:
        ConfigError: if there is none, or the model has not one of them.
    """
    wanted = sorted(set(layers))
    if not wanted:
        raise ConfigError(f"no layer to collect: name at least one of 0 to {model.n_layers - 1}")
    for layer in wanted:
        model.path(("key", layer))  # raises for a layer that is not there
    return wanted


class _Enough(Exception):
    """The highest layer's keys have been read."""


def _add(model: Model, sums: Sums, batch: Batch, counted: list[list[bool]]) -> None:
    """One forward pass, whose keys at counted tokens are added in every layer."""
    width = batch.input_ids.shape[1]
    mask = torch.tensor([flags + [False] * (width - len(flags)) for flags in counted])
    chosen = None if mask.all() else mask.flatten().nonzero()[:, 0].to(model.device)
    highest = max(sums.layers)

    def adder(layer: int) -> Patch:
        def take(keys: Tensor) -> None:
            keys = keys.flatten(0, 1)
            sums.add(layer, keys if chosen is None else keys[chosen])
            if layer == highest:
                raise _Enough

        return take

    try:
        with torch.no_grad(), hooked(model, {("key", layer): adder(layer) for layer in sums.layers}):
            model.forward(batch)
    except _Enough:
        pass


def _flags(model: Model, which: str) -> _Flags:
    """A function that says of a text's token ids which count."""
    if which == "not-first":
        return lambda ids: [index > 0 for index in range(len(ids))]
    special = set(model.tokenizer.all_special_ids) if which == "not-special" else set()
    return lambda ids: [token not in special for token in ids]


def _rows(
    model: Model, texts: Iterable[str], max_tokens: int, max_length: int, flags: _Flags, consumed: TextDigest
) -> Iterator[list[int]]:
    """Token ids of text after text, cut to `max_length`; `max_tokens` tokens that count in all."""
    left = max_tokens
    for text in texts:
        consumed.add(require_text(text))
        ids = model.ids(text[: _CHARACTERS * max_length])[:max_length]
        reached = list(itertools.accumulate(map(int, flags(ids))))
        if not reached or not reached[-1]:
            continue
        if reached[-1] > left:
            ids = ids[: reached.index(left) + 1]
        yield ids
        left -= min(left, reached[-1])
        if not left:
            return


def _batches(rows: Iterable[list[int]]) -> Iterator[list[list[int]]]:
    """Rows in batches, out of order within a window so that rows of a length are together.

    The same rows give the same batches, whatever happens meanwhile.
    """
    window: list[list[int]] = []
    held = 0
    for row in rows:
        window.append(row)
        held += len(row)
        if held >= _WINDOW:
            yield from _cut(window)
            window, held = [], 0
    yield from _cut(window)


def _cut(window: list[list[int]]) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    for row in sorted(window, key=len):
        if batch and (len(batch) + 1) * len(row) > _BATCH:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _skip(batches: Iterator[list[list[int]]], sums: Sums, place: Path) -> None:
    """Pass over the batches that are in the sums already, and make sure that they are the same."""
    trail = ""
    for rows in itertools.islice(batches, sums.batches):
        trail = _trail(trail, rows)
    if trail != sums.trail:
        raise StaleStatistics(
            f"the texts are no longer those that {place} was begun with, so it cannot be gone on with. Remove it"
        )


def _trail(trail: str, rows: list[list[int]]) -> str:
    return hashlib.sha256(f"{trail} {rows}".encode()).hexdigest()
