"""Fine-tuning one layer on one fact: FT, FT+L (Zhu et al., 2020) and the attention edit of the paper's appendix I.

1. `config`: which weights, how they are trained, and what was published for which model.
2. `trained`: which parameters these are, in this model.
3. `optimise`: the loss, Adam, and the bound on the change.
"""

from errata.editors.fine_tuning.config import FineTuningConfig
from errata.editors.fine_tuning.editor import attention, ft, ft_l

__all__ = ["FineTuningConfig", "attention", "ft", "ft_l"]
