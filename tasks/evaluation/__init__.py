"""Models under every attack of the settings, AutoAttack among them, and the report of the figures.

Imports d2r_core and tasks.config; knows nothing of tracking, the registry or where models come from.
"""
