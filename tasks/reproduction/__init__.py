"""Makes a registered version again, from its entry in the registry alone and in a folder of its own.

Imports tasks.registry and tasks.pipeline; registers nothing, and changes nothing outside of that folder.
"""
