"""A corpus of simple English that a small language model writes, and what is made of it.

prompts.py -> sampling.py -> filters.py -> store.py; then recall/ and tokenizer.py
"""
