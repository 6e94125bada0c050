"""Images from any source: downloaded archives and folders read, decoded, split, written and described.

Imports tasks.config and d2r_core's tensors; knows nothing of models.
"""
