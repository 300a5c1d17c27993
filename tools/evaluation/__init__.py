"""Evaluation: tasks that are scored item by item, by generation or by log-likelihood."""
