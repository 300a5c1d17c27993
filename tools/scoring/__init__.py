"""Measures of a language model: perplexity, and the retrieval of a passkey from a long text."""
