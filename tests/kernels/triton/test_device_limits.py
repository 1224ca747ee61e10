"""What a launch says when a device cannot hold a kernel; the device is played."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from seer_compile.errors import HardwareUnsupportedError
from seer_compile.kernels.triton import pool_resident
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


@pytest.mark.parametrize(("major", "takes"), [(9, True), (8, False), (12, False)])
def test_weights_stay_on_the_chip_where_products_read_them_there(major, takes, monkeypatch):
    monkeypatch.setattr(pool_resident, "is_hopper", lambda _: major == 9)
    monkeypatch.setattr(pool_resident, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(pool_resident, "shared_memory", lambda _: 232448)
    device = torch.device("cuda", 0)
    tokens = SimpleNamespace(
        is_cuda=True, device=device, shape=(1, 8, 65536, 64), element_size=lambda: 2
    )
    arguments = (tokens, torch.zeros(8, 192, 64), 4, "mean,max,min")
    assert pool_resident.takes(*arguments, groups=1) is takes
    assert not pool_resident.takes(*arguments, groups=2)
    assert not pool_resident.takes(tokens, torch.zeros(8, 64, 64), 4, "mean", groups=1)
