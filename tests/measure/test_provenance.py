"""Where a number comes from."""

import json

import torch

from resnet_fused.measure import provenance


def test_provenance_is_json_and_complete():
    facts = json.loads(json.dumps(provenance.collect(torch.device("cpu"), "resnet-fused bench"), allow_nan=False))
    assert facts["torch"] == torch.__version__ and facts["gpu"] is None and facts["onednn"]
    assert facts["cpu"]["threads"] == torch.get_num_threads() and facts["cpu"]["name"]
    assert facts["date_utc"].endswith("+00:00") and facts["command"] == "resnet-fused bench"
    assert facts["commit"] is None or (len(facts["commit"]["sha"]) == 40 and isinstance(facts["commit"]["dirty"], bool))
