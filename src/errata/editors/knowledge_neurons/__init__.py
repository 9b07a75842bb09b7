"""Knowledge Neurons (Dai et al., 2022): changing the few neurons that express a fact so that they express another.

1. `config`: settings: how neurons are found and what is written into them.
2. `attribution`: how much each neuron of each MLP raises the object's probability, by integrated gradients.
3. `neurons`: the selection of strong neurons that several prompts share.
4. `editor`: edits: the neurons' columns of the down-projections are moved from the old object to the new one.
"""

from errata.editors.knowledge_neurons.config import KnowledgeNeuronsConfig
from errata.editors.knowledge_neurons.editor import kn

__all__ = ["KnowledgeNeuronsConfig", "kn"]
