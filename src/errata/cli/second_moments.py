"""Options for the source of second moments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from errata.editors.method import Method
    from errata.models.model import Model
    from errata.statistics.corpus import Corpus as Texts
    from errata.statistics.second_moment import SecondMoment

Corpus = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Texts for the second moment: a file or folder (.txt, .jsonl, .parquet, .gz), wikipedia, or a dataset "
        "hf:NAME (optionally with :CONFIG or :CONFIG:SPLIT) at --revision. The atlas has its own."
    ),
]
Field = Annotated[str, typer.Option(help="The field with the text, in .jsonl, .parquet and datasets.")]
Revision = Annotated[Optional[str], typer.Option(help="The commit of a dataset; for wikipedia there is a default.")]  # noqa: UP045
Tokens = Annotated[
    int, typer.Option("--corpus-tokens", min=1, help="Maximum number of tokens to read from the corpus.")
]
File = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--second-moment", help="A stored second moment instead of a corpus: errata's file, or the ROME authors' .npz."
    ),
]
Identity = Annotated[bool, typer.Option("--identity", help="Use no second moment (C = 1).")]


@dataclass(frozen=True)
class Source:
    """Source of second moments, as the options give it."""

    corpus: str | None
    field: str
    revision: str | None
    tokens: int = 100_000
    file: Path | None = None
    identity: bool = False
    download: bool = False

    def __post_init__(self) -> None:
        from errata.base.errors import ConfigError

        given = [("--identity", self.identity), ("--second-moment", self.file), ("--corpus", self.corpus)]
        named = [name for name, value in given if value]
        if len(named) > 1:
            raise ConfigError(f"the second moment is given twice, by {' and '.join(named)}: give one")

    def for_method(self, method: Method, model: Model) -> Callable[[int], SecondMoment] | None:
        """A function from a layer to its second moment, for a method that uses them."""
        return (lambda layer: self.of(model, layer)) if method.uses_second_moment else None

    def of(self, model: Model, layer: int) -> SecondMoment:
        """The second moment of a layer's keys: read, found in the cache, or collected now.

        Without any option it is that of the model's own corpus, or one that `errata stats` put into the cache.

        Raises:
            ConfigError: if no corpus is named, or it cannot be used.
            StaleStatistics: if a file is of another model or layer.
        """
        from errata.cli import show
        from errata.statistics.second_moment import SecondMoment
        from errata.statistics.store import collect_cached, known_second_moment, load_any

        if self.identity:
            return SecondMoment.identity(model.d_mlp)
        if self.file:
            return load_any(self.file, layer, model)
        with show.progress(f"second moment of layer {layer}", "tokens") as bar:
            if self.corpus is None and model.own_corpus is None and (found := known_second_moment(model, layer)):
                return found
            return collect_cached(model, [layer], self.texts(model), self.tokens, progress=bar)[layer]

    def texts(self, model: Model) -> Texts:
        """The corpus that the options name, or the model's own.

        Raises:
            ConfigError: if none is named, or it cannot be used.
        """
        from errata import atlas
        from errata.api import ATLAS
        from errata.base.errors import ConfigError
        from errata.statistics.corpus import Corpus

        if self.corpus is None and model.own_corpus is not None:
            corpus: Texts = model.own_corpus()
            return corpus
        if self.corpus is None:
            raise ConfigError(
                f"ROME needs text to learn which keys of {model.name} to leave alone: give --corpus FILE (some 100,000 "
                "tokens) or --corpus wikipedia --download, or --identity to do without"
            )
        if self.corpus == ATLAS and not Path(ATLAS).exists():
            return atlas.own_corpus()
        return Corpus.open(self.corpus, field=self.field, revision=self.revision, download=self.download)
