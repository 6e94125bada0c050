"""The D2R method (arXiv 2506.07056): models, attacks, training and evaluation.

Knows tensors and files. Imports PyTorch, NumPy, safetensors and the standard library, so that it runs where nothing
else is installed.
"""
