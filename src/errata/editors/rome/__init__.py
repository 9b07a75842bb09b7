"""ROME, Rank-One Model Editing (Meng, Bau, Andonian, Belinkov, 2022), in the steps of the paper.

1. `config`: settings, published settings by model, and the presets.
2. `contexts`: prefixes x_j, sampled from the model, before the prompt p; `texts`: the contexts as tokens.
3. `key`: k*, what the layer's down-projection reads at the subject's last token.
4. `value`: v*, what it must write there for the model to say the new object.
5. `insert`: ΔW = (v* − Wk*) (C⁻¹k*)ᵀ / (k*ᵀC⁻¹k*).
6. `exactness`: how exactly the edit holds in the weight's own dtype.
"""

from errata.editors.rome.config import RomeConfig
from errata.editors.rome.editor import rome

__all__ = ["RomeConfig", "rome"]
