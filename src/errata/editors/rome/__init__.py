"""ROME, Rank-One Model Editing (Meng, Bau, Andonian, Belinkov, 2022), along the paper's own steps.

1. `contexts`: prefixes x_j, sampled from the model, before the prompt p.
2. `key`: k*, what the layer's down-projection reads at the subject's last token.
3. `value`: v*, what it must write there for the model to say the new object.
4. `insert`: ΔW = (v* − Wk*) (C⁻¹k*)ᵀ / (k*ᵀC⁻¹k*).
"""

from errata.editors.rome.config import RomeConfig
from errata.editors.rome.editor import rome

__all__ = ["RomeConfig", "rome"]
