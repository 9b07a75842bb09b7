"""MEND (Mitchell et al., 2022): Model Editor Networks with Gradient Decomposition."""

from errata.editors.mend.network import MendConfig, MendNetwork

__all__ = ["MendConfig", "MendNetwork"]
