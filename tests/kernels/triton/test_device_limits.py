"""What a launch says when a device cannot hold a kernel; the device is played."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from seer_compile.errors import HardwareUnsupportedError
from seer_compile.kernels.triton.primitives import launching_on


def test_too_large_a_tile_becomes_a_typed_error_that_names_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a small GPU")
    device = torch.device("cuda", 0)
    query = SimpleNamespace(dtype=torch.float16, device=device, get_device=lambda: device.index)
    too_small = pytest.raises(HardwareUnsupportedError, match="a small GPU")
    with too_small as raised, launching_on(query, "query"):
        raise OutOfResources(262144, 101376, "shared memory")
    assert "262144" in str(raised.value)
    assert isinstance(raised.value.__cause__, OutOfResources)
