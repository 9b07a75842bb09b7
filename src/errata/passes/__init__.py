"""Floor 2: forward passes that can be read and patched. The only code that registers hooks on a `Model`."""
