"""Text: tokenizers as models are published with, chat templates, incremental decoding."""
