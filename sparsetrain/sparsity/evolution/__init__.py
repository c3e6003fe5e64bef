"""Masks that change during training: the rules, and the manager that applies them."""
