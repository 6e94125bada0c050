"""DVC as a child process: stages reproduced, their state, and versions of data sets.

Imports tasks.config and tasks.data; knows nothing of what a stage does.
"""
