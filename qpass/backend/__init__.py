"""``torch.compile(model, backend="qpass")`` and what stands between a lowered graph and Inductor."""

from qpass.backend.backend import Backend, backend, qpass_backend

__all__ = ["Backend", "backend", "qpass_backend"]
