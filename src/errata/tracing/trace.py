"""Causal tracing of one fact: Figure 1 of the paper.

Three runs of the model on the fact's prompt:

- clean: as it is. The answer is its most probable next token, with probability P[o].
- corrupted: noise on the subject's embeddings. The answer's probability is P*[o].
- restored: corrupted, but at one site (part, layer, token) the clean run's activation is put back; P*,clean[o].

Total effect TE = P[o] − P*[o]; indirect effect of a site IE = P*,clean[o] − P*[o]. Probabilities are means over
samples of noise. A `state` site is one block output h. An `mlp` or `attention` site is a window of layers around
its layer, in which the module's outputs at that token are restored together, since one of them alone does little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from errata.base.errors import ConfigError, ResultFileError
from errata.base.extras import needed
from errata.base.facts import Fact
from errata.base.tensor_files import read_tensors, write_tensors
from errata.models.model import Batch, Model, Stream
from errata.models.tokens import check_length, locate_fact
from errata.passes.hooks import Patch
from errata.passes.patching import run
from errata.passes.reading import read
from errata.tracing.corruption import gaussian, subject_sigma

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

PARTS = ("state", "mlp", "attention")
ROLES = ("first subject", "middle subject", "last subject", "first after", "further", "last")

WindowEdges = Literal["paper", "reference"]
FORMAT = 1
KIND = "causal trace"
# Rows of one forward pass; one row is one noise sample of one site.
ROWS = 512


@dataclass(frozen=True, eq=False)
class CausalTrace:
    """What causal tracing found for one fact.

    Attributes:
        fact: the fact that was traced.
        answer: the clean run's most probable next token, as text.
        tokens: the prompt's tokens, readable.
        subject: indexes of the subject's first and last token, both inclusive.
        clean: P[o], a probability.
        corrupted: P*[o], mean over noise samples.
        restored: for each part, P*,clean[o] as float64 `[tokens, layers]`, mean over noise samples.
        settings: noise level, samples, window, seed and all else that decides the numbers.
        model: name of the model.
    """

    fact: Fact
    answer: str
    tokens: tuple[str, ...]
    subject: tuple[int, int]
    clean: float
    corrupted: float
    restored: Mapping[str, np.ndarray]
    settings: Mapping[str, Any]
    model: str

    @property
    def total_effect(self) -> float:
        """TE: what the corruption takes from the answer's probability."""
        return self.clean - self.corrupted

    def indirect_effect(self, part: str = "state") -> np.ndarray:
        """IE of every site of a part, `[tokens, layers]`: what restoring it gives back.

        Raises:
            ConfigError: if the part was not traced.
        """
        if part not in self.restored:
            raise ConfigError(f"{part!r} was not traced; this trace has {', '.join(self.restored)}")
        return self.restored[part] - self.corrupted

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of each token, one of `ROLES`, or "before" in front of the subject.

        A one-token subject is a *last subject*; a token that ends both subject and prompt too.
        """
        first, last = self.subject
        end = len(self.tokens) - 1

        def role(i: int) -> str:
            if i < first:
                return "before"
            if i <= last:
                return "last subject" if i == last else "first subject" if i == first else "middle subject"
            return "last" if i == end else "first after" if i == last + 1 else "further"

        return tuple(role(i) for i in range(end + 1))

    def best(self, part: str = "state", *, in_subject: bool = True) -> tuple[int, int, float]:
        """Token, layer and indirect effect of the site that restores most.

        By default of the subject's tokens: that is the early site. The late one, the last token's state on its way
        to the head, restores everything by itself and says nothing.
        """
        effect = self.indirect_effect(part)
        begin, end = (self.subject[0], self.subject[1] + 1) if in_subject else (0, len(self.tokens))
        token, layer = np.unravel_index(int(effect[begin:end].argmax()), effect[begin:end].shape)
        return begin + int(token), int(layer), float(effect[begin + token, layer])

    def to_frame(self) -> pandas.DataFrame:
        """One row a site: part, token (index), text, role, layer, restored, indirect_effect.

        Raises:
            MissingExtra: if pandas is not installed.
        """
        rows = [
            (part, token, self.tokens[token], self.roles[token], layer, value, value - self.corrupted)
            for part, values in self.restored.items()
            for token, line in enumerate(values.tolist())
            for layer, value in enumerate(line)
        ]
        columns = ["part", "token", "text", "role", "layer", "restored", "indirect_effect"]
        return needed("pandas", "tables").DataFrame(rows, columns=columns)

    def figure(self) -> Figure:
        """The fact's maps side by side, after Figure 1 of the paper.

        Raises:
            MissingExtra: if matplotlib is not installed.
        """
        from errata.plots.trace import trace_figure

        return trace_figure(
            self.restored,
            self.tokens,
            self.subject,
            low=self.corrupted,
            high=self.clean,
            answer=self.answer,
            window=self.settings["window"],
        )

    def plot(self, path: str | Path) -> None:
        """Write `figure()` as PNG, SVG or PDF, by the path's ending.

        Raises:
            ConfigError: if the ending is another.
            OutputError: if the file cannot be written.
        """
        from errata.plots.trace import save

        save(self.figure(), path)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with readable metadata, whole or not at all.

        Raises:
            OutputError: if the file cannot be written.
        """
        header = {
            "fact": [self.fact.subject, self.fact.prompt, self.fact.object],
            "answer": self.answer,
            "tokens": list(self.tokens),
            "subject": list(self.subject),
            "clean": self.clean,
            "corrupted": self.corrupted,
            "settings": dict(self.settings),
            "model": self.model,
        }
        tensors = {part: torch.from_numpy(values) for part, values in self.restored.items()}
        write_tensors(path, KIND, FORMAT, header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> CausalTrace:
        """A saved trace.

        Raises:
            ResultFileError: if the file is missing, cut short or no trace of ours.
        """
        header, tensors = read_tensors(path, KIND, FORMAT, ResultFileError)
        try:
            found = cls(
                fact=Fact(*header["fact"]),
                answer=header["answer"],
                tokens=tuple(header["tokens"]),
                subject=(int(header["subject"][0]), int(header["subject"][1])),
                clean=float(header["clean"]),
                corrupted=float(header["corrupted"]),
                restored={part: tensors[part].numpy() for part in PARTS if part in tensors},
                settings=dict(header["settings"]),
                model=header["model"],
            )
            first, last = found.subject
            shapes = {values.shape for values in found.restored.values()}
            whole = len(shapes) == 1 and all(len(s) == 2 and s[0] == len(found.tokens) for s in shapes)
            if not whole or not 0 <= first <= last < len(found.tokens):
                raise ValueError("its maps, tokens and subject do not fit together")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ResultFileError(f"{path} is a broken causal trace ({error}). Trace the fact again") from error
        return found


def trace(
    model: Model,
    fact: Fact,
    *,
    parts: Sequence[str] = PARTS,
    samples: int = 10,
    noise: float | None = None,
    multiple: float = 3.0,
    subjects: Sequence[str] = (),
    window: int | None = None,
    window_edges: WindowEdges = "paper",
    seed: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> CausalTrace:
    """Trace one fact: restore every site from the subject's first token on, and see what comes back.

    Sites before the subject are not run: nothing there is corrupted, so their effect is exactly zero.

    Args:
        model: any decoder.
        fact: its object is not needed: the answer is what the clean model says.
        parts: which maps to make, of "state", "mlp", "attention".
        samples: noise samples, 10 in the paper.
        noise: standard deviation ν of the noise; if None, `multiple` times σ.
        multiple: the paper's 3.
        subjects: where σ is measured; if none are given, on what the model's config says
            (`errata["subject_sigma"]`), and failing that on this fact's subject.
        window: layers restored together for `mlp` and `attention`; if None 10, as in the paper, or a fifth of the
            layers (at least 3) in models with fewer than 30.
        window_edges: "paper": 10 layers around l are [l−4, l+5]; "reference": [l−5, l+4], the published code's.
        seed: of the noise; 1 gives the published code's.
        progress: called with sites done and sites in all.

    Raises:
        ConfigError: if a setting is out of range.
        FactError: if the prompt does not fit the model's context.
    """
    parts = _checked(parts, samples, noise, multiple, window, window_edges, seed)
    span = locate_fact(model.tokenizer, fact)
    check_length(span, model.max_length)
    batch = model.batch([span.ids])
    level, sigma = _noise_level(model, fact, noise, multiple, subjects)
    width = window or default_window(model.n_layers)

    clean = read(
        model, batch, [("embedding", 0), *((part, layer) for part in parts for layer in range(model.n_layers))]
    )
    probabilities = _probabilities(model, batch, {})[0]
    answer = int(probabilities.argmax())

    subject = slice(span.first, span.last + 1)
    noisy = level * gaussian(samples, span.last + 1 - span.first, clean["embedding", 0].shape[-1], seed)

    def corrupt(embedding: Tensor) -> Tensor:
        copies = len(embedding) // samples
        disturbed = embedding.clone()
        disturbed[:, subject] += noisy.repeat(copies, 1, 1).to(embedding)
        return disturbed

    def answer_probability(patches: Mapping[Stream, Patch], copies: int) -> Tensor:
        """Mean over samples, for each of `copies` sites that share a forward pass."""
        rows = copies * samples
        repeated = Batch(batch.input_ids.expand(rows, -1), batch.attention_mask.expand(rows, -1))
        found = _probabilities(model, repeated, {("embedding", 0): corrupt, **patches})[:, answer].double()
        return found.reshape(copies, samples).mean(1)

    corrupted = float(answer_probability({}, 1)[0])
    restored = {part: np.full((len(span.ids), model.n_layers), corrupted) for part in parts}
    sites = [
        (part, layer, token)
        for part in parts
        for token in range(span.first, len(span.ids))
        for layer in range(model.n_layers)
    ]
    share = max(1, ROWS // samples)
    for begin in range(0, len(sites), share):
        chosen = sites[begin : begin + share]
        patches = _restoring(chosen, clean, samples, model.n_layers, width, window_edges)
        for (part, layer, token), value in zip(chosen, answer_probability(patches, len(chosen)).tolist(), strict=True):
            restored[part][token, layer] = value
        if progress:
            progress(min(begin + share, len(sites)), len(sites))

    return CausalTrace(
        fact=fact,
        answer=str(model.tokenizer.decode([answer])),
        tokens=span.tokens,
        subject=(span.first, span.last),
        clean=float(probabilities[answer]),
        corrupted=corrupted,
        restored=restored,
        settings={
            "samples": samples,
            "noise": level,
            "multiple": None if noise is not None else multiple,
            "sigma": sigma,
            "window": width,
            "window_edges": window_edges,
            "seed": seed,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        model=model.name,
    )


def default_window(layers: int) -> int:
    """10 as in the paper, or a fifth of the layers, at least 3, in models with fewer than 30."""
    return 10 if layers >= 30 else max(3, round(layers / 5))


def window_layers(layer: int, width: int, edges: WindowEdges, layers: int) -> range:
    """The layers of the window around one layer, cut at both ends of the model."""
    before = (width - 1) // 2 if edges == "paper" else width // 2
    return range(max(0, layer - before), min(layers, layer - before + width))


def _restoring(
    sites: Sequence[tuple[str, int, int]],
    clean: Mapping[Stream, Tensor],
    samples: int,
    layers: int,
    width: int,
    edges: WindowEdges,
) -> dict[Stream, Patch]:
    """Patches that restore site i in rows `i·samples` to `(i+1)·samples`."""
    where: dict[Stream, list[tuple[int, int]]] = {}
    for number, (part, layer, token) in enumerate(sites):
        for other in [layer] if part == "state" else window_layers(layer, width, edges, layers):
            where.setdefault((part, other), []).append((number, token))

    def restore(stream: Stream) -> Patch:
        rows = torch.tensor([number * samples + k for number, _ in where[stream] for k in range(samples)])
        tokens = torch.tensor([token for _, token in where[stream] for _ in range(samples)])

        def put_back(tensor: Tensor) -> Tensor:
            patched = tensor.clone()
            patched[rows, tokens] = clean[stream][0, tokens]
            return patched

        return put_back

    return {stream: restore(stream) for stream in where}


@torch.no_grad()
def _probabilities(model: Model, batch: Batch, patches: Mapping[Stream, Patch]) -> Tensor:
    """Next-token probabilities `[b, v]` after the last token, in float32 at least."""
    logits = run(model, batch, patches, batch.last)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)


def _noise_level(
    model: Model, fact: Fact, noise: float | None, multiple: float, subjects: Sequence[str]
) -> tuple[float, float | None]:
    """The noise's standard deviation, and the σ that it came from, if it did."""
    if noise is not None:
        return noise, None
    known = model.hints.get("subject_sigma")
    sigma = float(known) if known and not subjects else subject_sigma(model, subjects or [fact.subject])
    return multiple * sigma, sigma


def _checked(
    parts: Sequence[str],
    samples: int,
    noise: float | None,
    multiple: float,
    window: int | None,
    window_edges: str,
    seed: int,
) -> tuple[str, ...]:
    if isinstance(parts, str):
        parts = [parts]
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise ConfigError(f"parts are {', '.join(PARTS)}; got {', '.join(map(repr, unknown)) or 'none'}")
    if samples < 1:
        raise ConfigError(f"samples is {samples}: the corrupted run needs at least one sample of noise")
    if samples > ROWS:
        raise ConfigError(f"samples is {samples}: at most {ROWS} fit into one forward pass; the paper takes 10")
    level = noise if noise is not None else multiple
    if not 0 < level < 1e6:  # NaN is neither
        raise ConfigError(f"the noise is {level}: it must be a number greater than zero, or nothing is corrupted")
    if window is not None and window < 1:
        raise ConfigError(f"window is {window}: at least one layer must be restored")
    if window_edges not in ("paper", "reference"):
        raise ConfigError(f"window_edges is 'paper' or 'reference', not {window_edges!r}")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed is {seed}: it must be from 0 to 2**32 - 1")
    return tuple(parts)
