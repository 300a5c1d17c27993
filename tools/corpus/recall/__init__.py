"""Recall documents: stories with facts planted in them that are asked for far behind.

facts.py (what is told) -> wordings.py (how) -> documents.py (where)
"""
