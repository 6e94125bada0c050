"""MLflow's runs: what a training logs while it runs, and what a model was made from.

It observes: no artifact depends on it. Imports tasks.config and tasks.data for the manifest.
"""
