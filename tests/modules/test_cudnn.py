"""A cuDNN that cannot compute the VAE is refused, with what to upgrade."""

from __future__ import annotations

import pytest
import torch

from modules import cudnn
from modules.cudnn import check_conv3d
from modules.errors import ResourceError

CUDA = torch.device("cuda")


def with_cudnn(monkeypatch: pytest.MonkeyPatch, version: int | None) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(torch.version, "cuda", "12.8")


@pytest.mark.parametrize("version", [90800, 91002, 91400, 91499])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cudnn_without_half_precision_3d_convolutions_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: int, dtype: torch.dtype
) -> None:
    with_cudnn(monkeypatch, version)
    monkeypatch.setattr(cudnn.sys, "platform", "linux")
    with pytest.raises(ResourceError, match=r"(?s)nvidia-cudnn-cu12>=9\.15.*--vae_dtype float32") as caught:
        check_conv3d(CUDA, dtype)
    assert f"cuDNN 9.{version // 100 % 100}.{version % 100} has no 3D convolution" in str(caught.value)


def test_on_windows_a_newer_build_of_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cudnn(monkeypatch, 91002)
    monkeypatch.setattr(cudnn.sys, "platform", "win32")
    with pytest.raises(ResourceError, match="newer build of torch") as caught:
        check_conv3d(CUDA, torch.float16)
    assert "pip install" not in str(caught.value)


@pytest.mark.parametrize("version", [None, 90701, 91500, 92000, 3005000])
def test_other_versions_are_accepted(monkeypatch: pytest.MonkeyPatch, version: int | None) -> None:
    with_cudnn(monkeypatch, version)
    check_conv3d(CUDA, torch.float16)


def test_what_needs_no_cudnn_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    with_cudnn(monkeypatch, 91002)
    check_conv3d(CUDA, torch.float32)
    check_conv3d(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    check_conv3d(CUDA, torch.float16)
