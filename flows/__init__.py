"""The flow that composes the tasks, its deployment, and the command line `d2r`.

May import everything in tasks and d2r_core; nobody imports flows.
"""
