"""Kernels of any target: code that Inductor generates for the q/dq graph itself."""
