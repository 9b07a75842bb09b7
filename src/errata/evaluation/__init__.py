"""Floor 5, beside the atlas: editors over many records, in runs that may be stopped and go on."""
