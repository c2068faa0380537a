"""A search over ResNet-50 with made-up times, on a GPU that is only a name."""

import pytest
from tune_doubles import ARCH, CPU, DTYPE, GPU, Bench, Clock

from resnet_fused.measure.network import networks
from resnet_fused.measure.progress import Silent
from resnet_fused.tuning import candidates as listing
from resnet_fused.tuning import search as tune_search
from resnet_fused.tuning.precompile import Precompiler
from resnet_fused.tuning.problems import blocks, jobs
from resnet_fused.tuning.search import SAME, Search

N, FACTS = 256, dict.fromkeys(SAME, "1")


@pytest.fixture(scope="module")
def resnet50():
    """The network, its problems and its blocks."""
    (network,) = networks(["resnet50"], 224)
    found = jobs(network, ("infer", "train"), N, DTYPE, ARCH, False, alternatives=True)
    found = [
        job for job in found if job.problem.shape not in [(N, 64, 112, 112)] or job.problem.op == "bn_act_max_pool"
    ]
    return network, found, blocks(network, N, DTYPE, False)


@pytest.fixture
def search(resnet50, tmp_path, monkeypatch):
    """Makes a search over ResNet-50, on a GPU that is only a name."""
    monkeypatch.setattr(listing, "backends", lambda device: ["triton", "cuda"])
    clock = Clock()
    monkeypatch.setattr(tune_search, "time", clock)
    network, found, whole = resnet50
    path = tmp_path / "t.json"

    def make(again=False, bench=None, **options):
        bench = bench or Bench(clock, path, **options)
        made = Search(CPU, ARCH, GPU, FACTS, path, again, False, bench, Precompiler(ARCH, 0), Silent())
        return made, bench

    make.clock, make.path, make.network, make.jobs, make.blocks = clock, path, network, found, whole
    return make
