"""The D2R method (arXiv 2506.07056): models, attacks, losses, training and evaluation.

Knows tensors and files only; needs torch, numpy and safetensors and nothing else.
"""
