"""The loss and its gradient equal TRL's, and come from the trained tokens only."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl.trainer import utils

from prefixtune_cli.train import train
from prefixtune_cli.train.fused_head import fitted_to
from tests.train.test_run import recipe

IDS = torch.arange(24).reshape(2, 12)


def labels(trained: slice) -> torch.Tensor:
    found = torch.full_like(IDS, -100)
    found[:, trained] = IDS[:, trained]
    return found


def projected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows that each further call projects onto the vocabulary."""
    seen: list[int] = []
    original = utils._ChunkedLogProbFunction.apply

    def apply(hidden: torch.Tensor, *args: object) -> object:
        seen.append(len(hidden))
        return original(hidden, *args)

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", apply)
    return seen


def loss_and_gradients(model: PreTrainedModel, trained: slice) -> list[torch.Tensor]:
    model = copy.deepcopy(model)
    utils.add_fused_lm_head(model)
    loss = model(input_ids=IDS, labels=labels(trained), fused_lm_head=True).loss
    loss.backward()
    return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("trained", [slice(9, 12), slice(0, 12), slice(0, 0)], ids=str)
def test_the_loss_and_every_gradient_are_trls(random_base: Path, trained: slice) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_base, dtype=torch.float32)
    expected = loss_and_gradients(model, trained)
    with fitted_to(torch.device("cpu")):
        found = loss_and_gradients(model, trained)
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_training_projects_the_trained_tokens_alone(
    random_base: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = projected(monkeypatch)
    masks: list[int] = []
    forward = utils.FusedCausalLMOutput.__init__

    def count(self: object, *args: object, label_mask: torch.Tensor, **kwargs: object) -> None:
        masks.append(int(label_mask.sum()))
        forward(self, *args, label_mask=label_mask, **kwargs)

    monkeypatch.setattr(utils.FusedCausalLMOutput, "__init__", count)
    train(recipe(random_base, colours, tmp_path / "run", train={"max_steps": 3}))
    assert seen and seen == masks


def test_what_stands_in_trl_is_put_back() -> None:
    before = utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE
    with fitted_to(torch.device("cpu")):
        assert utils._use_triton(torch.device("cpu"))
        assert before[1] > utils._CHUNKED_LOGPROB_CHUNK_SIZE
    assert (utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE) == before
    with fitted_to(torch.device("cuda")):
        assert (utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE) == before
