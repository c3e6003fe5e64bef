"""A training step on several machines: how it is divided, what travels, how long it takes, what it holds."""
