"""What verbs load is put on the GPU where there is one."""

import torch
from torch import nn

from tests.oracles import SPEC
from worldline.commands.sampling import load_scorer
from worldline.policies.encoder import EncoderConfig
from worldline.rl_in_imagination.success import SuccessConfig, SuccessScorer


def test_a_scorer_is_used_on_the_gpu_where_there_is_one(tmp_path, monkeypatch) -> None:
    small = SuccessConfig(hidden=8, encoder=EncoderConfig(window=2, channels=(8,), features=8))
    SuccessScorer(small, SPEC).save_pretrained(tmp_path)
    sent = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nn.Module, "to", lambda module, *to, **_: sent.append((module, *to)) or module)
    scorer = load_scorer(tmp_path)
    assert sent[-1] == (scorer, "cuda")
