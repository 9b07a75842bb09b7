"""Executors: measure the chunks of a run in this process, or by Ray workers that hold a model each.

The numbers do not depend on who measures a chunk, when, or how often a worker died on it, only on the chunk, the work
and the model. An executor writes no file.
"""

from __future__ import annotations

import math
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from errata.base.errors import ConfigError, ErrataError
from errata.base.extras import needed
from errata.editors.editor import Editor
from errata.evaluation.measure import Measured, Measures, measure
from errata.evaluation.run_header import provenance
from errata.models.model import Model
from errata.tasks.registry import task_of
from errata.tasks.task import Case

DEATHS = 3  # of workers over one chunk, or in a row while they load the model, until it counts as systematic
PATIENCE = 300.0  # seconds in which a cluster, which may still be growing, has to find room for a worker


class WorkerLost(ErrataError, RuntimeError):
    """Workers that died repeatedly on the same chunk. Earlier measurements are kept."""


@dataclass(frozen=True)
class Chunk:
    """Records that are measured together.

    Attributes:
        records: the records.
        editors: names of the rows whose editors are to be measured.
        before: whether the unedited model is measured too.
    """

    records: tuple[Case, ...]
    editors: tuple[str, ...]
    before: bool


@dataclass(frozen=True)
class Work:
    """Everything needed to measure any chunk of a run; it can be sent to another process.

    Attributes:
        task: name of the task.
        editors: editors by the names of their rows.
        measures: the settings of the measurement.
        keep_edits: whether the edits are wanted with what was measured of them.
    """

    task: str
    editors: Mapping[str, Editor]
    measures: Measures
    keep_edits: bool = False

    def do(self, model: Model, chunk: Chunk) -> Measured:
        """Measure a chunk."""
        editors = {name: self.editors[name] for name in chunk.editors}
        found = measure(model, task_of(self.task), chunk.records, editors, chunk.before, self.measures)
        return found if self.keep_edits else replace(found, edits={})

    def without_model(self) -> Work:
        """The same work, with editors that hold no model, to send to another process."""
        return replace(self, editors={name: editor.without_model() for name, editor in self.editors.items()})


class Executor(Protocol):
    """Measures chunks, here or elsewhere."""

    def run(self, work: Work, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, Measured]]:
        """Each chunk with its measurements, as they are finished; closing the iterator ends the work."""


@dataclass(frozen=True)
class Here:
    """Executor in this process: chunks one after the other, on the loaded model."""

    model: Model

    def run(self, work: Work, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, Measured]]:
        """See `Executor.run`."""
        for chunk in chunks:
            yield chunk, work.do(self.model, chunk)


@dataclass(frozen=True)
class Cluster:
    """Executor on Ray: each worker is a process with its own model, and gets the next chunk when it is done.

    If this process is connected to Ray already, that connection is used, and kept.

    Attributes:
        model: the model as it is here; workers with any other, on another kind of device, or with other versions of
            the libraries are refused.
        load: loads it in a worker, such as `functools.partial(errata.load_model, "gpt2-xl", device="cuda")`; there
            "cuda" is the GPU that Ray gives the worker.
        address: of a cluster that is left running, such as "auto" or "ray://host:10001"; None: one of this machine
            alone, started now and ended with the work.
        workers: how many at most; None: as many as CPUs, GPUs and memory allow, a worker counted as twice the weights.
        cpus: for each worker, which computes with as many threads.
        gpus: for each worker, where 0.5 means that two share one; None: one if the model is on a GPU, else none.

    Raises:
        ConfigError: if one of the numbers cannot be, or does not go with the device that the model is on.
        MissingExtra: if Ray is not installed.
    """

    model: Model
    load: Callable[[], Model]
    address: str | None = None
    workers: int | None = None
    cpus: float = 1
    gpus: float | None = None

    def __post_init__(self) -> None:
        _ray()
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"there cannot be {self.workers} workers: one is the least")
        if not 0 < self.cpus < math.inf:
            raise ConfigError(f"a worker cannot have {self.cpus} CPUs: give more than 0")
        on_gpu = any(device.type == "cuda" for device in self.model.devices)
        gpus = float(on_gpu) if self.gpus is None else self.gpus
        if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
            raise ConfigError(f"a worker cannot have {gpus} GPUs: give a share of one, or a whole number")
        if on_gpu and not gpus:
            raise ConfigError(
                "the model is on a GPU and the workers are given none, so they could not load it: give each a GPU, or "
                "a share of one such as 0.5"
            )
        if gpus and not on_gpu:
            raise ConfigError(
                "the workers are given GPUs and the model is not on one here, so they would lie idle: load it with the "
                "device cuda, or give the workers none"
            )
        object.__setattr__(self, "gpus", gpus)

    def run(self, work: Work, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, Measured]]:
        """See `Executor.run`. A chunk whose worker died is measured again by another.

        Raises:
            ConfigError: if the cluster cannot be reached or has no room for a worker, or a worker has another model.
            WorkerLost: if workers keep dying over a chunk, or while they load the model.
            ErrataError: what a worker was stopped by.
        """
        if not chunks:
            return
        ray = _ray()
        with self._connected(ray):
            crew = _Crew(ray, self, work, chunks)
            try:
                yield from crew.results()
            finally:
                crew.dismiss()

    @contextmanager
    def _connected(self, ray: Any) -> Iterator[None]:
        """A connection to the cluster, with the chatter of Ray kept off the terminal."""
        if ray.is_initialized():
            yield
            return
        settings: dict[str, Any] = {"address": self.address, "log_to_driver": False, "logging_level": "CRITICAL"}
        if self.address is None:
            cpus = max(_cpus_here() if self.workers is None else 0, math.ceil((self.workers or 1) * self.cpus))
            settings |= {"address": "local", "num_cpus": cpus, "include_dashboard": False}
        try:
            ray.init(**settings)
        except (ImportError, OSError, RuntimeError, TimeoutError, ValueError) as error:
            where = "on this machine" if self.address is None else f"at {self.address}"
            raise ConfigError(f"there is no cluster of Ray to be had {where}: {_first_line(error)}") from error
        try:
            yield
        finally:
            ray.shutdown()


class _Crew:
    """The workers of one run, and what each of them is doing."""

    def __init__(self, ray: Any, cluster: Cluster, work: Work, chunks: Sequence[Chunk]):
        self.ray, self.cluster, self.chunks = ray, cluster, chunks
        self.provenance = provenance(cluster.model)
        self.need = {kind: amount for kind, amount in (("CPU", cluster.cpus), ("GPU", cluster.gpus)) if amount}
        self.size = min(len(chunks), cluster.workers or self._room())
        self.job = ray.put((cluster.load, work.without_model()))
        self.worker = ray.remote(
            num_cpus=cluster.cpus, num_gpus=cluster.gpus, max_restarts=0, scheduling_strategy="SPREAD"
        )(_Worker)
        self.waiting = deque(range(len(chunks)))
        self.under_way: dict[Any, tuple[Any, int | None]] = {}  # by reference: worker, and chunk or None as it loads
        self.placed: dict[Any, Any] = {}  # by worker: what is there once Ray has found room for it
        self.deaths: Counter[int | None] = Counter()  # over each chunk; under None while loading, in a row

    def results(self) -> Iterator[tuple[Chunk, Measured]]:
        """Deal chunks out and take in what was measured."""
        for _ in range(self.size):
            self._hire()
        left = len(self.chunks)
        while left:
            worker, number, answer = self._next()
            if answer is None:  # it died
                if number is not None:
                    self.waiting.appendleft(number)
                if self.waiting:
                    self._hire()
                continue
            if isinstance(answer, ErrataError):
                raise answer
            if number is None:
                self._require_same(*answer)
                self.deaths[None] = 0
            if self.waiting:
                following = self.waiting.popleft()
                self.under_way[worker.do.remote(self.chunks[following])] = worker, following
            else:
                self._dismiss(worker)
            if number is not None:
                left -= 1
                yield self.chunks[number], answer

    def dismiss(self) -> None:
        """End all workers, whatever they are doing."""
        for worker in list(self.placed):
            self._dismiss(worker)

    def _hire(self) -> None:
        worker = self.worker.remote()
        self.placed[worker] = worker.place.remote()
        self.under_way[worker.begin.remote(self.job, max(1, int(self.cluster.cpus)))] = worker, None

    def _dismiss(self, worker: Any) -> None:
        del self.placed[worker]
        self.ray.kill(worker)

    def _next(self) -> tuple[Any, int | None, Any]:
        """A worker that is done, with which chunk (None: with loading), and what it says; None if it died.

        Raises:
            ConfigError: if no worker finds room.
            WorkerLost: if this was one death too many.
        """
        from ray.exceptions import RayError, RayTaskError

        while not (done := self.ray.wait(list(self.under_way), timeout=PATIENCE)[0]):
            if not self.ray.wait(list(self.placed.values()), timeout=0)[0]:
                raise self._no_room()
        worker, number = self.under_way.pop(done[0])
        try:
            return worker, number, self.ray.get(done[0])
        except RayTaskError:  # an error of the work itself: of the kind it has there, and with its traceback
            raise
        except RayError as error:
            self._dismiss(worker)
            self.deaths[number] += 1
            if self.deaths[number] >= DEATHS:
                raise self._lost(number, error) from error
            return worker, number, None

    def _room(self) -> int:
        """Number of workers that the cluster has room for; at least one if it may still grow."""
        need = {**self.need, "memory": 2 * self.cluster.model.hf.get_memory_footprint()}
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        return max(1, sum(min(int(node.get(kind, 0) / need[kind] + 1e-6) for kind in need) for node in nodes))

    def _no_room(self) -> ConfigError:
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        told = "; ".join(_amounts({kind: node.get(kind, 0) for kind in ("CPU", "GPU")}) for node in nodes)
        return ConfigError(
            f"no worker has found room on the cluster in {PATIENCE:g} seconds: each is to have {_amounts(self.need)}, "
            f"and the nodes have {told}, which others may be using. Ask for less per worker, or add nodes"
        )

    def _lost(self, number: int | None, error: Exception) -> WorkerLost:
        if number is None:
            return WorkerLost(
                f"{DEATHS} workers in a row died while they loaded the model, most likely for want of memory: have "
                f"fewer workers. Ray says: {_first_line(error)}"
            )
        cases = ", ".join(str(record.case_id) for record in self.chunks[number].records)
        return WorkerLost(
            f"{DEATHS} workers died over the same records, cases {cases}: if it was for want of memory, have fewer "
            f"workers; else leave these records out. Ray says: {_first_line(error)}"
        )

    def _require_same(self, host: str, theirs: Mapping[str, Any]) -> None:
        """Check that a worker has loaded the same model; its name may differ."""
        different = [
            f"{key} is {theirs[key]} there and {self.provenance[key]} here"
            for key in self.provenance
            if key != "model" and theirs[key] != self.provenance[key]
        ]
        if different:
            raise ConfigError(
                f"a worker on {host} would measure another model, or the same otherwise, than this process has: "
                f"{'; '.join(different)}. Let all load the same files with the same libraries"
            )


class _Worker:
    """The worker in a Ray process. It returns errata's errors, so that they arrive unchanged."""

    def place(self) -> None:
        """Nothing: the call returns once there is a process to run it."""

    def begin(self, job: tuple[Callable[[], Model], Work], threads: int) -> tuple[str, dict[str, Any]] | ErrataError:
        """Load the model; the host's name, and what was loaded there."""
        torch.set_num_threads(threads)
        host = socket.gethostname()
        try:
            load, self.work = job
            self.model = load()
            return host, provenance(self.model)
        except ErrataError as error:
            return type(error)(f"a worker on {host} cannot load the model: {error}")

    def do(self, chunk: Chunk) -> Measured | ErrataError:
        """Measure a chunk."""
        try:
            return self.work.do(self.model, chunk)
        except ErrataError as error:
            return error


def _ray() -> Any:
    """Ray, which sends no usage statistics, and starts no environments of its own, unless its variables say so."""
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_UV_RUN_RUNTIME_ENV"):
        os.environ.setdefault(name, "0")
    return needed("ray", "ray")


def _cpus_here() -> int:
    """CPUs that this process may use, which a scheduler may have made fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in resources.items())


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
