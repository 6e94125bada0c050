"""What the two training stages share: from settings to the trainer of d2r_core, and from its result to the artifacts.

Imports d2r_core, tasks.config, tasks.data for the manifest and tasks.tracking.
"""
