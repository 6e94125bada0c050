"""The model registry: versions and their aliases, the gate, and the comparison with the champion.

Imports tasks.tracking to reach MLflow and tasks.evaluation to measure the champion; nothing of DVC or Prefect.
"""
