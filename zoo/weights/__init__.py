"""Weights: folders, GGUF, the Hugging Face hub, and how they fill a model."""
