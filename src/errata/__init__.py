"""Locate and edit factual associations in transformer language models.

    import errata

    model = errata.load_model("atlas")
    fact = errata.Fact("Toyota RAV4", "{} is made by the company", "Toyota")
    errata.trace(model, fact).plot("trace.png")
    edit = errata.rome(model, fact.rewrite("Honda"))

Names are loaded when they are first used: `import errata` is instant and brings in no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.api import editor as editor
    from errata.api import load_model as load_model
    from errata.base.errors import ErrataError as ErrataError
    from errata.base.facts import Fact as Fact
    from errata.base.facts import Rewrite as Rewrite
    from errata.base.versions import __version__ as __version__
    from errata.editors.fine_tuning import attention as attention
    from errata.editors.fine_tuning import ft as ft
    from errata.editors.fine_tuning import ft_l as ft_l
    from errata.editors.hypernetworks.editor import ke as ke
    from errata.editors.hypernetworks.editor import mend as mend
    from errata.editors.knowledge_neurons import kn as kn
    from errata.editors.rome import rome as rome
    from errata.editors.rome.config import RomeConfig as RomeConfig
    from errata.edits.edit import Edit as Edit
    from errata.edits.ledger import ledger as ledger
    from errata.edits.ledger import save_merged as save_merged
    from errata.evaluation.measure import Generation as Generation
    from errata.evaluation.measure import Measures as Measures
    from errata.evaluation.results import Run as Run
    from errata.evaluation.runner import evaluate as evaluate
    from errata.evaluation.sequence import edit_in_sequence as edit_in_sequence
    from errata.evaluation.sweep import sweep as sweep
    from errata.models.model import Model as Model
    from errata.statistics.collect import collect
    from errata.statistics.corpus import Corpus as Corpus
    from errata.statistics.second_moment import SecondMoment as SecondMoment
    from errata.tasks.records import read_records as read_records
    from errata.tasks.task import Task as Task
    from errata.tracing.average import average_effects as average_effects
    from errata.tracing.config import TraceConfig as TraceConfig
    from errata.tracing.gradients import integrated_gradients as integrated_gradients
    from errata.tracing.many import trace_facts as trace_facts
    from errata.tracing.result import CausalTrace as CausalTrace
    from errata.tracing.result import load_traces as load_traces
    from errata.tracing.trace import trace as trace

    second_moments = collect

_HOME = {
    "__version__": ("errata.base.versions", "__version__"),
    "load_model": ("errata.api", "load_model"),
    "rome": ("errata.editors.rome", "rome"),
    "ft": ("errata.editors.fine_tuning", "ft"),
    "ft_l": ("errata.editors.fine_tuning", "ft_l"),
    "attention": ("errata.editors.fine_tuning", "attention"),
    "kn": ("errata.editors.knowledge_neurons", "kn"),
    "mend": ("errata.editors.hypernetworks.editor", "mend"),
    "ke": ("errata.editors.hypernetworks.editor", "ke"),
    "editor": ("errata.api", "editor"),
    "read_records": ("errata.tasks.records", "read_records"),
    "evaluate": ("errata.evaluation.runner", "evaluate"),
    "Run": ("errata.evaluation.results", "Run"),
    "Measures": ("errata.evaluation.measure", "Measures"),
    "Generation": ("errata.evaluation.measure", "Generation"),
    "trace": ("errata.tracing.trace", "trace"),
    "ErrataError": ("errata.base.errors", "ErrataError"),
    "Fact": ("errata.base.facts", "Fact"),
    "Rewrite": ("errata.base.facts", "Rewrite"),
    "Edit": ("errata.edits.edit", "Edit"),
    "RomeConfig": ("errata.editors.rome.config", "RomeConfig"),
    "Model": ("errata.models.model", "Model"),
    "second_moments": ("errata.statistics.collect", "collect"),
    "SecondMoment": ("errata.statistics.second_moment", "SecondMoment"),
    "TraceConfig": ("errata.tracing.config", "TraceConfig"),
    "trace_facts": ("errata.tracing.many", "trace_facts"),
    "load_traces": ("errata.tracing.result", "load_traces"),
    "average_effects": ("errata.tracing.average", "average_effects"),
    "integrated_gradients": ("errata.tracing.gradients", "integrated_gradients"),
    "Corpus": ("errata.statistics.corpus", "Corpus"),
    "edit_in_sequence": ("errata.evaluation.sequence", "edit_in_sequence"),
    "ledger": ("errata.edits.ledger", "ledger"),
    "save_merged": ("errata.edits.ledger", "save_merged"),
    "sweep": ("errata.evaluation.sweep", "sweep"),
    "Task": ("errata.tasks.task", "Task"),
    "CausalTrace": ("errata.tracing.result", "CausalTrace"),
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'errata' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
