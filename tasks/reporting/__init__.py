"""Pages for people: charts, figures and pictures from finished artifacts, and the templates that they fill.

Measures nothing itself, and imports nothing that runs a model.
"""
