"""Integrated gradients: Figure 16 of the paper, another measure of which activations an answer depends on.

Nothing is corrupted here. In the clean run, one activation x `[d_model]` at one token is replaced by αx; after the rest
of the run, the answer's probability is P_αx[o]. The activation's integrated gradient is

    I = x ⊙ ∫₀¹ ∂P_αx[o] / ∂(αx) dα,

by Gauss-Legendre quadrature; the figure shows its Euclidean norm. Its components add up to P_x[o] − P_0[o], up to the
quadrature's error, which is not always small: a norm directly after x removes α except for very small α, where there
are few points. This concerns states, and outputs that are normed before they are added (Gemma 3, OLMo 2); more points
show the size of the error. A site is a state, or the output of one MLP or attention module: no window of layers as in a
trace.

The clean run is recorded once. Each site and α is a row that joins a sweep through the blocks where the site is, at
its token and those after it; one backward pass then serves all rows of a sweep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor
from typing_extensions import TypedDict

from errata.base.arguments import checked
from errata.base.autocast import without_autocast
from errata.base.budgets import groups
from errata.base.config import Config
from errata.base.errors import ConfigError, Diverged, ResultFileError
from errata.base.facts import Fact
from errata.base.journal import read_journal, write_journal
from errata.base.parsing import of_type, taking_apart
from errata.base.versions import library_versions
from errata.models.fingerprint import weights_digest
from errata.models.frozen import frozen
from errata.models.model import Model
from errata.passes.replay import Recording, record, tell_if_plain
from errata.tracing.config import TraceConfig, each_once, several
from errata.tracing.result import CausalTrace, Origin
from errata.tracing.runs import Progress, checked_memory
from errata.tracing.tokenized import tokenize_fact

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = "integrated gradients"
FORMAT = 1


class _Record(TypedDict):
    """The one line of a file."""

    fact: list[str]
    answer: str
    tokens: list[str]
    subject: Annotated[list[int], Field(min_length=2, max_length=2)]
    probability: Annotated[float, Field(ge=0, le=1)]
    norms: dict[str, list[list[float]]]
    sums: dict[str, list[list[float]]]
    settings: dict[str, Any]


Part = Literal["state", "mlp", "attention"]

_Site = tuple[int, str]  # (layer, part), of the token at hand


class GradientsConfig(Config):
    """Settings of `integrated_gradients`, all checked. The defaults are the paper's."""

    parts: tuple[Part, ...] = Field(("state", "mlp", "attention"), min_length=1, description="The maps to make.")
    points: int = Field(50, ge=1, description="Number of points of the quadrature.")
    answer: Literal["model", "object"] = Field(
        default="model",
        description='The token whose probability is differentiated: what the "model" itself says next, or the first '
        'token of the fact\'s "object".',
    )

    _several = field_validator("parts", mode="before")(several)
    _each_once = field_validator("parts")(each_once)


@dataclass(frozen=True, eq=False)
class IntegratedGradients:
    """Integrated gradients of an answer's probability with respect to every site of one prompt.

    Attributes:
        fact: the fact whose prompt was run.
        answer: the token whose probability it is, as text.
        tokens: the prompt's tokens, readable.
        subject: indexes of the subject's first and last token, both inclusive.
        probability: P[o] of the clean run.
        norms: for each part, ‖I‖ as float64 `[tokens, layers]`, in units of probability.
        sums: for each part, the sum of I's components, float64 `[tokens, layers]`: P_x[o] − P_0[o].
        settings: parts, points, answer and dtype.
        model: name of the model.
        fingerprint: digest of the model's weights.
        versions: versions of the libraries that computed it.
    """

    fact: Fact
    answer: str
    tokens: tuple[str, ...]
    subject: tuple[int, int]
    probability: float
    norms: Mapping[str, np.ndarray]
    sums: Mapping[str, np.ndarray]
    settings: Mapping[str, Any]
    model: str
    fingerprint: str = ""
    versions: Mapping[str, str] = field(default_factory=library_versions)

    def figure(self, trace: CausalTrace) -> Figure:
        """The indirect effects of a trace of the same prompt, and below them the norms, after Figure 16 of the paper.

        Raises:
            ConfigError: if the trace is of another prompt, answer or model, or lacks a part.
            MissingExtra: if matplotlib is not installed.
        """
        from errata.plots.gradients import gradients_figure

        for name, theirs, ours in (
            ("prompt", (trace.fact.text, trace.subject), (self.fact.text, self.subject)),
            ("answer", trace.answer, self.answer),
            ("model", (trace.model, trace.fingerprint), (self.model, self.fingerprint)),
        ):
            if theirs != ours:
                raise ConfigError(
                    f"the trace is of another {name} than these gradients ({theirs!r}, not {ours!r}), so their maps do "
                    "not compare: trace the same fact with the same model and answer"
                )
        return gradients_figure(
            {part: trace.indirect_effect(part) for part in self.norms},
            self.norms,
            self.tokens,
            self.subject,
            answer=self.answer,
            window=trace.settings["window"],
        )

    def plot(self, trace: CausalTrace, path: str | Path) -> None:
        """Write `figure(trace)` as PNG, SVG or PDF, by the path's ending.

        Raises:
            ConfigError: as `figure`, or if the ending is another.
            OutputError: if the file cannot be written.
        """
        from errata.plots.drawing import save

        save(self.figure(trace), path)

    def save(self, path: str | Path) -> None:
        """Write a journal (`base.journal`) with this one record, atomically.

        Raises:
            OutputError: if the file cannot be written.
        """
        maps = {"norms": self.norms, "sums": self.sums}
        values = {
            "fact": self.fact.as_list(),
            "answer": self.answer,
            "tokens": list(self.tokens),
            "subject": list(self.subject),
            "probability": self.probability,
            **{name: {part: each.tolist() for part, each in of.items()} for name, of in maps.items()},
            "settings": dict(self.settings),
        }
        header = {"model": self.model, "fingerprint": self.fingerprint, "versions": dict(self.versions)}
        write_journal(path, KIND, FORMAT, header, [values])

    @classmethod
    def load(cls, path: str | Path) -> IntegratedGradients:
        """Load saved gradients, bit for bit.

        Raises:
            ResultFileError: if the file is missing, cut short, broken, or something else.
        """
        header, records = read_journal(path, KIND, FORMAT)
        if len(records) != 1:
            raise ResultFileError(f"{path} holds {len(records)} whole records, not one: make or fetch it again")
        with taking_apart(path, f"a file of whole {KIND}", advice="Make them again"):
            of_type(records[0], _Record)
            return _from_record(records[0], of_type(header, Origin))


def _from_record(values: Mapping[str, Any], header: Mapping[str, Any]) -> IntegratedGradients:
    tokens, (first, last) = tuple(values["tokens"]), values["subject"]
    norms, sums = (
        {str(part): np.array(lines, dtype=np.float64) for part, lines in values[name].items()}
        for name in ("norms", "sums")
    )
    shapes = {each.shape for each in (*norms.values(), *sums.values())}
    whole = norms.keys() == sums.keys() and len(shapes) == 1 and {len(shape) for shape in shapes} == {2}
    if not whole or {shape[0] for shape in shapes} != {len(tokens)} or not 0 <= first <= last < len(tokens):
        raise ValueError("their maps, tokens and subject do not fit together")
    if not all(np.isfinite(each).all() for each in (*norms.values(), *sums.values())):
        raise ValueError("a number is missing")
    return IntegratedGradients(
        fact=Fact(*values["fact"]),
        answer=values["answer"],
        tokens=tokens,
        subject=(first, last),
        probability=float(values["probability"]),
        norms=norms,
        sums=sums,
        settings=dict(values["settings"]),
        model=header["model"],
        fingerprint=header["fingerprint"],
        versions=dict(header["versions"]),
    )


@checked(model="Model", fact="Fact")
@without_autocast
@torch.inference_mode(False)  # a caller in inference mode gets gradients all the same
def integrated_gradients(
    model: Model,
    fact: Fact,
    *,
    parts: Sequence[str] = ("state", "mlp", "attention"),
    points: int = 50,
    answer: str = "model",
    memory: int | None = None,
    progress: Progress | None = None,
) -> IntegratedGradients:
    """Integrated gradients of the answer's probability, for all tokens and layers of a fact's prompt.

    The model is left as it was, whatever happens: no weight gets a gradient, and what was trainable is so again.

    Args:
        model: any decoder.
        fact: its object is not needed, unless answer="object".
        parts: some of "state", "mlp" and "attention".
        points: number of points of the Gauss-Legendre quadrature.
        answer: what the "model" itself says next, or the first token of the fact's "object".
        memory: bytes that the runs may take beside the model; None: half of what is free, at most 2 GiB (24 on a GPU).
        progress: called with sites done and sites in all, of those that are run.

    Raises:
        ConfigError: if a setting is out of range.
        FactError: if the prompt does not fit the model's context, or there is no object where one is needed.
        UnsupportedModel: if the model's blocks cannot be resumed.
        Diverged: if a probability or gradient is not a finite number.
    """
    settings: dict[str, Any] = {"parts": parts, "points": points, "answer": answer}
    config = GradientsConfig(**settings)
    tokenized = tokenize_fact(model, fact, TraceConfig(answer=config.answer))
    budget = checked_memory(memory, model) // 2  # half for what autograd keeps, half for what a block holds meanwhile
    tell_if_plain(model)
    keep = [(part, layer) for part in config.parts if part != "state" for layer in range(model.n_layers)]
    recording = record(model, model.batch([tokenized.ids]), keep=keep)
    runs = _Runs(recording, config, tokenized.target[0] if tokenized.target else None)

    shape = (recording.length, model.n_layers)
    norms: dict[str, np.ndarray] = {part: np.zeros(shape) for part in config.parts}
    sums: dict[str, np.ndarray] = {part: np.zeros(shape) for part in config.parts}
    # What the last block writes at another token than the last reaches nothing: its gradient is exactly zero.
    reached = [model.n_layers if token == recording.length - 1 else model.n_layers - 1 for token in range(shape[0])]
    done, of = 0, sum(reached) * len(config.parts)
    with torch.enable_grad(), frozen(model):
        for token, layers in enumerate(reached):
            sites = [(layer, part) for layer in range(layers) for part in config.parts]
            for (layer, part), integral in runs.integrals(token, sites, budget):
                norms[part][token, layer] = float(integral.norm())
                sums[part][token, layer] = float(integral.sum())
                done += 1
                if progress:
                    progress(done, of)
    return IntegratedGradients(
        fact=fact,
        answer=str(model.tokenizer.decode([runs.target])),
        tokens=tokenized.span.tokens,
        subject=(tokenized.span.first, tokenized.span.last),
        probability=runs.probability,
        norms=norms,
        sums=sums,
        settings={
            **config.model_dump(mode="json"),
            "dtype": str(model.dtype).removeprefix("torch."),
            **({"engine": "plain"} if recording.engine == "plain" else {}),
        },
        model=model.name,
        fingerprint=weights_digest(model.hf),
    )


class _Runs:
    """Runs that vary a recorded one by scaling a single activation.

    Attributes:
        target: token id of the answer.
        probability: P[o] of the recorded run.
    """

    def __init__(self, recording: Recording, config: GradientsConfig, target: int | None):
        self.model, self.recording = recording.model, recording
        nodes, weights = np.polynomial.legendre.leggauss(config.points)
        wide = torch.promote_types(self.model.dtype, torch.float32)
        self.alphas = torch.tensor((nodes + 1) / 2, dtype=wide, device=self.model.device)
        self.weights = torch.tensor(weights / 2)
        with torch.no_grad():
            logs = self._log_probabilities(recording.states[self.model.n_layers][:, -1])[0]
        self.target = int(logs.argmax()) if target is None else target
        self.probability = float(logs[self.target].exp())

    def integrals(self, token: int, sites: Sequence[_Site], memory: int) -> Iterator[tuple[_Site, Tensor]]:
        """Sites in ascending order of layers, each with its I, float64 `[d_model]` on the CPU.

        Raises:
            Diverged: if a probability or gradient is not a finite number.
        """
        block, head = self._bytes_kept(token), self._bytes_of_head()
        points = [(site, point) for site in sites for point in range(len(self.alphas))]
        costs = [head + block * (self.model.n_layers - layer) for (layer, _), _ in points]
        unfinished: dict[_Site, Tensor] = {}
        for group in groups(costs, memory):
            fractions = {
                site: slice(first[1], first[1] + 1 + len(others))
                for site, (first, *others) in groupby(points[group.start : group.stop], lambda point: point[0])
            }
            for (site, some), gradients in zip(fractions.items(), self._gradients(token, fractions), strict=True):
                integral = self._activation(site, token).cpu().double() * (self.weights[some] @ gradients)
                integral = integral + unfinished.pop(site, 0)
                if some.stop == len(self.alphas):
                    yield site, integral
                else:
                    unfinished[site] = integral

    def _gradients(self, token: int, fractions: Mapping[_Site, slice]) -> list[Tensor]:
        """∂P_αx[o] / ∂(αx) `[points, d_model]`, float64 on the CPU, of each site for some of the α."""
        layers, clean = self.model.n_layers, self.recording.states
        leaves: list[Tensor] = []
        states = clean[0].new_empty(0, self.recording.length - token, self.model.d_model)
        for layer in range(min(layer for layer, _ in fractions), layers):
            if len(states):
                states = self._step(layer, states, token, keep=1 if layer == layers - 1 else None)
            for (its_layer, part), some in fractions.items():
                if its_layer == layer:
                    x = self._activation((layer, part), token)
                    leaves.append((self.alphas[some, None] * x).to(x.dtype).requires_grad_())
                    here = self._at_token(layer, part, token, leaves[-1])
                    after = clean[layer + 1][:, token + 1 :].expand(len(here), -1, -1)
                    states = torch.cat([states, torch.cat([here, after], 1)])
        # ∂P = P ∂log P: what flows back is of order 1 however small P is, which numbers of 16 bits need.
        logs = self._log_probabilities(states[:, -1])[:, self.target]
        found = torch.autograd.grad(logs.sum(), leaves)
        scales = logs.detach().exp().cpu().double().split([len(leaf) for leaf in leaves])
        gradients = [p[:, None] * each.cpu().double() for p, each in zip(scales, found, strict=True)]
        if not all(bool(each.isfinite().all()) for each in gradients):
            raise Diverged(
                f"a gradient at token {token} is not a finite number: those of {self.model.name} overflow in "
                f"{self.model.dtype}, so nothing can be integrated. Load it with dtype 'float32' or 'bfloat16'"
            )
        return gradients

    def _at_token(self, layer: int, part: str, token: int, scaled: Tensor) -> Tensor:
        """Hidden state that leaves block `layer` at the token, `[r, 1, d_model]`, with `scaled` for the activation."""
        if part == "state":
            return scaled[:, None]
        entering = self.recording.states[layer][:, token : token + 1].repeat(len(scaled), 1, 1)
        # A copy, as some blocks add into what their modules return.
        return self._step(layer, entering, token, {part: lambda _, rows: scaled[rows, None].clone()})

    def _step(self, layer: int, states: Tensor, token: int, patches: Any = None, keep: int | None = None) -> Tensor:
        rows = torch.zeros(len(states), dtype=torch.long, device=states.device)
        return self.recording.step(layer, states, token, rows, patches, keep)

    def _activation(self, site: _Site, token: int) -> Tensor:
        """x `[d_model]`."""
        layer, part = site
        return (self.recording.states[layer + 1] if part == "state" else self.recording.kept[part, layer])[0, token]

    def _log_probabilities(self, states: Tensor) -> Tensor:
        """`[r, v]`, in float32 at least, after last states `[r, d_model]`."""
        logits = self.model.unembed(states)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def _bytes_kept(self, token: int) -> int:
        """Bytes that autograd keeps of one block for one row from the token on, measured in a trial."""
        kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no two have one address

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage
            return tensor.detach()

        weights = {parameter.untyped_storage().data_ptr() for parameter in self.model.hf.parameters()}
        entering = self.recording.states[0][:, token:].clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self._step(0, entering, token)
        return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)

    def _bytes_of_head(self) -> int:
        """Bytes of one row's logits, log-probabilities and their gradients."""
        return 4 * self.model.vocab_size * self.alphas.element_size()
