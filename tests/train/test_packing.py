"""Packed rows: examples that share a row do not see each other."""

from pathlib import Path

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from prefixtune_cli import model as models
from prefixtune_cli.recipe.schema import ModelSection, PrefixTuningPlus


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_examples_give_the_logits_that_they_give_alone(
    attention: str, random_base: Path
) -> None:
    section = ModelSection.model_validate(
        {"name": str(random_base), "bits": 32, "attention": attention}
    )
    model = models.attach(models.load_base(section), PrefixTuningPlus()).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    examples = [[5, 6, 7, 8], [9, 10, 11, 12, 13], [14, 15]]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate(
        [{"input_ids": [token for ids in examples for token in ids], "seq_lengths": [4, 5, 2]}]
    )
    batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0].split([4, 5, 2])
        for ids, found in zip(examples, packed, strict=True):
            alone = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-4)
