"""Tracks live tensor memory: bytes of tensors made by operators, from allocation to release.

Works on tensors of any device, and on those without data (meta) as well: the peak of a computation can be
estimated on a machine too small to run it. Kernels' own workspaces are not seen, and neither are
the roundings of an allocator.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Context that counts new storages; existing ones are not counted.

    Args:
        device_type: count tensors of this kind of device only; None counts all.
    """

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self._device_type = device_type
        self._sizes: dict[int, int] = {}
        self._watches: dict[int, weakref.ref[Any]] = {}
        self.live = 0
        """Bytes alive now."""
        self.peak = 0
        """The most that were alive at any time."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {_storage_id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _storage_id(leaf) not in given:
                self._add(leaf)
        self.peak = max(self.peak, self.live)
        return result

    def forget(self, tensor: Tensor) -> None:
        """Stop counting a tensor that is accounted for elsewhere."""
        self._remove(_storage_id(tensor))

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = _storage_id(tensor)
        is_wanted = self._device_type is None or tensor.device.type == self._device_type
        if key in self._sizes or not is_wanted:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        # torch keeps the Python object of a storage as long as anything, autograd included, holds it.
        self._watches[key] = weakref.ref(storage, lambda _: self._remove(key))

    def _remove(self, key: int) -> None:
        self._watches.pop(key, None)
        self.live -= self._sizes.pop(key, 0)


def _storage_id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
