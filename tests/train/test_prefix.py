"""Before the first step, a prefix that starts as real tokens equals those tokens."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model_state_dict

from prefixtune_cli import model as models
from prefixtune_cli.errors import DataError, RecipeError
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import ModelSection, PrefixTuning
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.train import train
from prefixtune_cli.train.prefix import start_at_rows
from tests.heard import Heard


def attached(base, **settings):
    section = PrefixTuning(num_virtual_tokens=6, **settings)
    model = models.attach(models.load_base(ModelSection(name=str(base), bits=32)), section)
    return model.eval(), section


def test_a_prefix_of_rows_is_the_base_that_has_read_them(random_base):
    model, section = attached(random_base, init="rows")
    start_at_rows(model, section, Dataset.from_dict({"input_ids": [[5, 9, 7, 3, 8, 2, 4, 6]]}), 0)
    asked = torch.tensor([[11, 12, 13]])
    with torch.no_grad():
        found = model(input_ids=asked).logits
        with models.without_adapter(model):
            read = model(input_ids=torch.tensor([[5, 9, 7, 3, 8, 2, 11, 12, 13]])).logits[:, 6:]
            unread = model(input_ids=asked).logits
    torch.testing.assert_close(found, read)
    assert not torch.allclose(found, unread, atol=1e-3)
    assert all(p.requires_grad for n, p in model.named_parameters() if "prompt_encoder" in n)


def test_the_seed_chooses_the_rows(random_base):
    rows = Dataset.from_dict({"input_ids": [[i, i + 1, i + 2] for i in range(3, 40)]})
    starts = []
    for seed in (0, 0, 1):
        model, section = attached(random_base, init="rows")
        start_at_rows(model, section, rows, seed)
        starts.append(get_peft_model_state_dict(model)["prompt_embeddings"])
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_rows_that_do_not_fill_the_prefix_are_refused(random_base):
    model, section = attached(random_base, init="rows")
    with pytest.raises(DataError, match=r"have only 3 tokens.*--num-virtual-tokens 3"):
        start_at_rows(model, section, Dataset.from_dict({"input_ids": [[5, 6, 7]]}), 0)


def test_a_random_prefix_stays_as_peft_made_it(random_base):
    model, section = attached(random_base)
    before = get_peft_model_state_dict(model)["prompt_embeddings"].clone()
    start_at_rows(model, section, Dataset.from_dict({"input_ids": [[5] * 9]}), 0)
    assert torch.equal(before, get_peft_model_state_dict(model)["prompt_embeddings"])


def test_an_mlp_cannot_start_at_rows():
    flags = {"adapter": {"method": "prefix-tuning", "init": "rows", "prefix_projection": True}}
    with pytest.raises(RecipeError, match="prefix_projection"):
        resolve(None, [], flags)


def test_a_run_starts_at_its_rows(random_base, colours, tmp_path):
    flags = {
        "model": {"name": str(random_base), "bits": 32},
        "data": {"train": str(colours), "eval_split": 0.25},
        "train": {"max_steps": 4, "batch_size": 4, "save_steps": 2, "learning_rate": 1e-6},
        "adapter": {"method": "prefix-tuning", "init": "rows", "num_virtual_tokens": 8},
        "out": str(tmp_path / "run"),
    }
    summary = train(resolve(None, [], flags), reporter=Heard())
    assert summary.trainable_parameters > 0
    random = {
        **flags,
        "adapter": {**flags["adapter"], "init": "random"},
        "out": str(tmp_path / "r"),
    }
    other = train(resolve(None, [], random), reporter=Heard())
    # At this rate nothing is learned, so only the start makes a difference.
    assert abs(summary.adapter.loss - other.adapter.loss) > 1e-3
    assert RunDir(tmp_path / "run").finished
