"""Floor 6, beside the atlas: evaluation of editors on many records, in runs that can be stopped and continued."""
