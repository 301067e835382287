"""Mask-Enhanced Autoregressive Prediction (MEAP, arXiv 2502.07490) pretraining on NVIDIA's Megatron Core."""

__version__ = "0.1.0"
