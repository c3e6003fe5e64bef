"""Decoding with a trained model: generation of text, and scores of given continuations."""
