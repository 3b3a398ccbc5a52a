"""ComfyUI's fingerprint of a model, without ComfyUI: the same whichever of its clones was sampled last."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import diff2flow_nodes


def _identity():
    """hosts/comfy/identity.py by itself; its package imports ComfyUI."""
    path = Path(diff2flow_nodes.__file__).parent / "hosts" / "comfy" / "identity.py"
    spec = importlib.util.spec_from_file_location("diff2flow_nodes.hosts.alone.identity", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_loading_a_patched_model_does_not_change_its_fingerprint():
    fingerprint = _identity().fingerprint
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


def test_sampling_a_clone_as_a_flow_does_not_change_a_models_fingerprint():
    """The clones share one network, and the sampling of the clone that was loaded last stands in it."""
    fingerprint = _identity().fingerprint
    network, flow = _with_sampling(), _Sampling(0.5)
    own = network.model_sampling
    plain = SimpleNamespace(model=network, patches={}, backup={}, get_model_object=lambda _: own)
    clone = SimpleNamespace(model=network, patches={}, backup={}, get_model_object=lambda _: flow)
    before, flowing = fingerprint(plain), fingerprint(clone)
    network.model_sampling = flow
    assert fingerprint(plain) == before != flowing == fingerprint(clone)


class _Sampling(nn.Module):
    def __init__(self, sigma):
        super().__init__()
        self.register_buffer("sigmas", torch.full((4,), sigma))


def _with_sampling():
    network = nn.Sequential(nn.Linear(8, 8))
    network.model_sampling = _Sampling(14.6)
    return network
