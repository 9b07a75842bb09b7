"""KnowledgeEditor (De Cao et al., 2021): a network reads the edit, and masks its gradient."""

from errata.editors.ke.network import KeConfig, KeNetwork

__all__ = ["KeConfig", "KeNetwork"]
