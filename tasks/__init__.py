"""The pipeline: one module per DVC stage, Prefect's tasks, and the rooms that they are made of.

Imports d2r_core, never flows. docs/design.md lists what each room may import.
"""
