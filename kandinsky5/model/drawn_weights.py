"""A stand-in for a missing DiT checkpoint: its names, shapes and dtypes, with random data.

Benchmarks load it through the code that loads the published files; plans are made from it where nothing has
been downloaded yet.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kandinsky5.model.checkpoints import build_meta_dit
from kandinsky5.model.dit import is_float32_island
from kandinsky5.tasks import DitParams
from modules.tensor_files import TensorInfo


class DrawnWeights:
    """A `WeightSource` in the published dtypes: modulation and time embedding float32, the rest bfloat16.

    Args:
        device: where tensors are drawn, one at a time, so that no host memory is needed for them.
    """

    def __init__(self, params: DitParams, device: torch.device, *, seed: int = 0) -> None:
        self._generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
        self._device = device
        infos: dict[str, TensorInfo] = {}
        position = 0
        for key, tensor in build_meta_dit(params, torch.bfloat16).state_dict().items():
            dtype = torch.float32 if is_float32_island(key) else torch.bfloat16
            end = position + tensor.numel() * dtype.itemsize
            infos[key] = TensorInfo(dtype, tuple(tensor.shape), position, end)
            position = end
        self.tensors: Mapping[str, TensorInfo] = infos
        self.metadata: Mapping[str, str] = {}

    def read(self, name: str) -> Tensor:
        """A tensor on the device: matrices keep the size of what they multiply, norms are 1, biases 0."""
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=info.dtype, device=self._device)
        if tensor.ndim < 2:
            return tensor.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        return tensor.normal_(std=0.5 / info.shape[1] ** 0.5, generator=self._generator)

    def view(self, name: str) -> Tensor:
        """The same; two calls draw twice."""
        return self.read(name)
