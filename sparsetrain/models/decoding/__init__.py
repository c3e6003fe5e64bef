"""What a trained model is asked for: text that continues a prompt, and scores of given continuations."""
