"""Trained editors (KE, MEND): a network turns the gradient of fine-tuning into an edit.

1. `factors`: the gradient of the edit's loss to the edited maps, as Σ δ ⊗ u over tokens.
2. `network`: base class of networks that turn these factors into a low-rank change; `mend` and `ke` extend it.
3. `training_examples`: the training data; `objective`: the loss of an edit; `training`: the training loop.
4. `files`: a trained network on disk, with the identity of its model.
5. `editor`: edits from rewrites.
"""
