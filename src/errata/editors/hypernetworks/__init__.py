"""Editors that are trained: a network makes an edit of the gradient that fine-tuning would take (KE, MEND).

1. `factors`: the gradient of the edit's loss to the edited maps, as Σ δ ⊗ u over tokens.
2. `network`: what makes a change of low rank of these factors; `mend` and `ke` are such.
3. `training_examples`: what it is trained on; `objective`: how good an edit is; `training`: the search for the weights.
4. `files`: a trained network on disk, with the model that it is for.
5. `editor`: from rewrites to edits.
"""
