"""The project's configuration: params.yaml checked and typed, the artifacts' paths, a stage's entry point and code.

Imports no other room of tasks, so that all of them can import it.
"""
