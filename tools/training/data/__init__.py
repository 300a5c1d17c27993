"""Data of a training run: sources are read, tokenised once, packed into rows and dealt in batches.

readers.py -> shards.py -> packing.py -> batches.py
"""
