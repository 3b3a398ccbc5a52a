"""ComfyUI's fingerprint of a model, without ComfyUI: the same before its patches are merged in and after."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import diff2flow_nodes


def _encoders():
    """hosts/comfy/encoders.py by itself; its package imports ComfyUI."""
    path = Path(diff2flow_nodes.__file__).parent / "hosts" / "comfy" / "encoders.py"
    spec = importlib.util.spec_from_file_location("diff2flow_nodes.hosts.alone.encoders", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_loading_a_patched_model_does_not_change_its_fingerprint():
    fingerprint = _encoders().fingerprint
    network = nn.Linear(8, 8)
    patches = {"weight": [(1.0, SimpleNamespace(weights=(torch.randn(8, 2), torch.randn(2, 8))), 1.0)]}
    patcher = SimpleNamespace(model=network, patches=patches, backup={})
    before = fingerprint(patcher)
    patcher.backup["weight"] = SimpleNamespace(weight=network.weight.detach().clone(), inplace_update=False)
    with torch.no_grad():
        network.weight += 1
    assert fingerprint(patcher) == before
    patcher.backup.clear()
    assert fingerprint(patcher) != before
