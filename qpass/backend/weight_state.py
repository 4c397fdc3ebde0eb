"""The state of weights at one moment, and which of them changed since.

Int8 kernels read packed copies. So a weight that changes after compilation must be packed again before the next call.
:class:`WeightState` says which weights changed, in a fraction of a microsecond for each, and keeps none alive.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

SAMPLE_BYTES = 8

_version: Callable[[Tensor], int] = attrgetter("_version")
_address: Callable[[Tensor], int] = Tensor.data_ptr
_value: Callable[[Any], int] = attrgetter("value")


class WeightState:
    """The state of some tensors, to compare with that of the tensors of a later call.

    It notices in-place updates by the version counter. It notices another tensor and ``weight.data = other`` by the
    address; since the address of a freed storage may be used again, a free counts as a change. Of writes that autograd
    does not see (``weight.data.copy_``, a NumPy view), it notices those that change the 8 bytes in the middle of the
    weight. Inference tensors have no version counter, so they are compared with a copy.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.remember(tensors)

    def remember(self, tensors: Sequence[Tensor]) -> None:
        """Take the present state of ``tensors`` as the one to compare with."""
        freed: set[int] = set()
        storages: dict[int, tuple[Any, list[int]]] = {}
        for index, tensor in enumerate(tensors):
            storage = tensor.untyped_storage()
            storages.setdefault(storage._cdata, (storage, []))[1].append(index)
        self._storages = [weakref.ref(storage, _note(freed, indices)) for storage, indices in storages.values()]
        self._freed = freed
        self._copies = [tensor.clone() if tensor.is_inference() else None for tensor in tensors]
        self._countable = not any(tensor.is_inference() for tensor in tensors)
        self._versions = [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        self._samples = [_sample(tensor) for tensor in tensors]
        self._sampled = [sample.value for sample in self._samples]

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the tensors were when they were remembered."""
        return tuple(self._addresses)

    @property
    def freed(self) -> bool:
        """Whether the memory of any of the tensors has been freed since."""
        return bool(self._freed)

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors``, in the order remembered, are and hold what they were and held then."""
        if not self._countable:
            return not self.changed(tensors)
        try:
            return (
                not self._freed
                and list(map(_version, tensors)) == self._versions
                and list(map(_address, tensors)) == self._addresses  # before memory is read, so that it is alive
                and list(map(_value, self._samples)) == self._sampled
            )
        except RuntimeError:  # an inference tensor took the place of an ordinary one; it has no version
            return False

    def changed(self, tensors: Sequence[Tensor]) -> list[int]:
        """The positions of the tensors that changed, or may have."""
        return [
            index for index, tensor in enumerate(tensors) if index in self._freed or self._differs(index, tensor)
        ]  # fmt: skip

    def _differs(self, index: int, tensor: Tensor) -> bool:
        copy = self._copies[index]
        if copy is not None:
            return not (tensor.is_inference() and torch.equal(tensor, copy))
        return (
            tensor.is_inference()
            or tensor._version != self._versions[index]
            or tensor.data_ptr() != self._addresses[index]
            or self._samples[index].value != self._sampled[index]
        )


def _note(freed: set[int], indices: Sequence[int]) -> Callable[[Any], None]:
    return lambda _: freed.update(indices)


def _sample(tensor: Tensor) -> Any:
    """The 8 bytes in the middle of a dense CPU tensor as a live ``.value``; a constant for other tensors."""
    size = tensor.numel() * tensor.element_size()
    dense = tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    if tensor.device.type != "cpu" or not dense or size < SAMPLE_BYTES:
        return ctypes.c_uint64(0)
    return ctypes.c_uint64.from_address(tensor.data_ptr() + (size - SAMPLE_BYTES) // 2)
