"""The start of Prefix-Tuning: random, or the keys and values that the base itself computes for some training rows.

A prefix that begins as a real prompt learns faster than a random one (Li and Liang 2021, section 7.4; Eyuboglu et al.
2025, "Cartridges").
"""

from __future__ import annotations

from itertools import islice
from typing import cast

import torch
from datasets import Dataset
from peft import PeftModel, initialize_kv_prefix_from_past_key_values
from transformers import PreTrainedModel

from prefixtune_cli.errors import DataError
from prefixtune_cli.model import cache_name, without_adapter
from prefixtune_cli.recipe.schema import AdapterSection, PrefixTuning


def start_at_rows(
    model: PeftModel | PreTrainedModel, section: AdapterSection, rows: Dataset, seed: int
) -> None:
    """If the recipe says so, give a fresh prefix the base's keys and values of concatenated training rows.

    Args:
        model: with the fresh adapter.
        section: the recipe's adapter; other methods, and `init: random`, change nothing.
        rows: tokenized rows; the seed chooses rows until they fill the prefix.
        seed: the run's.

    Raises:
        DataError: all rows together have fewer tokens than the prefix.
    """
    if not isinstance(section, PrefixTuning) or section.init != "rows":
        return
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    tokens = (token for row in order for token in rows[row]["input_ids"])
    ids = list(islice(tokens, section.num_virtual_tokens))
    if len(ids) < section.num_virtual_tokens:
        raise DataError(
            f"adapter.init is rows, but all rows together have only {len(ids)} tokens, and the prefix has "
            f"{section.num_virtual_tokens}. Type --num-virtual-tokens {len(ids)}, or --set adapter.init=random."
        )
    peft_model = cast(PeftModel, model)
    base = peft_model.get_base_model()
    place = next(base.parameters()).device
    with torch.no_grad(), without_adapter(peft_model):
        read = peft_model(input_ids=torch.tensor([ids], device=place), use_cache=True)
    cache = read[cache_name(base)]
    initialize_kv_prefix_from_past_key_values(peft_model, past_key_values=cache)
