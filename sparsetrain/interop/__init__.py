"""Models of other libraries: Hugging Face directories written and read, with their masks."""
