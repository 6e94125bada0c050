"""Whether prepared data are fit to train on: expectations, near duplicates, drift, and the page that shows them.

Imports tasks.config, tasks.reporting for the page, and d2r_core's tensors.
"""
