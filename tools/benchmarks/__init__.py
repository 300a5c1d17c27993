"""Measures of speed: attention kernels against their peers, correctness checked before time."""
