"""Floor 3: second moments of MLP keys over a corpus, C = E[k kᵀ] of the paper, and their storage."""

from errata.statistics.collect import collect
from errata.statistics.corpus import Corpus
from errata.statistics.second_moment import Halves, SecondMoment
from errata.statistics.store import collect_cached, load, load_any, save

__all__ = ["Corpus", "Halves", "SecondMoment", "collect", "collect_cached", "load", "load_any", "save"]
