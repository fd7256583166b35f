"""Devices, their engines' processes and kernels, and what is measured of them."""
