"""What one would use instead of slimdiff, behind one interface: see `PEERS`.

Structural peers remove at least `Job.remove` parameters from the attention and feed-forward layers
that slimdiff slims, all from the same calibration, and leave the pipeline alone. The packages are
those of `pip install 'slimdiff[bench]'`, imported when a peer is used.
"""

from __future__ import annotations

from peers import modegpt, obs_diff, svd, torch_pruning
from peers.at_macs import at_macs
from peers.deep_cache import deepcache, deepcache_of
from peers.job import Job, Peer
from peers.torchao_int8 import int8, int8_of, weight_bytes

__all__ = ["PEERS", "Job", "Peer", "at_macs", "deepcache", "int8", "weight_bytes"]

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("torch-pruning magnitude", "torch-pruning 1.6.1", torch_pruning.magnitude),
        Peer("torch-pruning taylor", "torch-pruning 1.6.1", torch_pruning.taylor),
        Peer("svd", "ours, plain SVD", svd.plain),
        Peer("svd-llm", "ours, after SVD-LLM, arXiv 2403.07378", svd.whitened),
        Peer("modegpt", "ours, after MoDeGPT, arXiv 2408.09632", modegpt.slim),
        Peer("obs-diff", "ours, after OBS-Diff, arXiv 2510.06751", obs_diff.slim),
        Peer("int8", "torchao 0.18.0", int8_of, structural=False),
        Peer("deepcache", "DeepCache 0.1.1", deepcache_of, structural=False),
    )
}
