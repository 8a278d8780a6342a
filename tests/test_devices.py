import pytest
import torch

from formats.devices import BLOCK_WEIGHTS, block_weights


@pytest.mark.parametrize(("device", "kind"), [("cpu", "cpu"), ("cuda:1", "cuda"), ("mps", "cuda"), ("xpu", "cuda")])
def test_every_kind_of_device_has_a_size_of_blocks(device: str, kind: str) -> None:
    assert block_weights(torch.device(device)) == BLOCK_WEIGHTS[kind]
