"""Prefix-Tuning+ as a PEFT method; importing this package registers it.

The method is by Wang et al., "Prefix-Tuning+: Modernizing Prefix-Tuning by Decoupling the Prefix from
Attention" (arXiv 2506.13674), which appeared at ICLR 2026 as PrefixMemory-Tuning. It adds to each head's
attention output what the query reads from a trained matrix (eq. 7):

    o_i = softmax-attention(q_i, K, V) + φ(q_i)ᵀ M_h

The same equation can be used beside the FFN (`sites`), with the blocks of its input in place of the queries.

The package imports nothing else of ptp, so it could be moved into PEFT as it is.

config, model, layer, register  the tuner, as PEFT has them
memory, feature_map             M and φ
read, triton_read, triton_kernels   o + φ(q)ᵀM, by PyTorch's operations or by Triton's
attention, feed_forward         the two sites
basis                           the basis in which M is trained
arithmetic, mixed_batch         several adapters: as one, and one for each row of a batch
"""

from prefixtune_cli.adapter.attention import (
    AttentionShape,
    UnsupportedModelError,
    attention_modules,
)
from prefixtune_cli.adapter.basis import (
    basis_state,
    fold_basis,
    identity_basis,
    initialize_basis,
    load_basis_state,
    step_weight,
)
from prefixtune_cli.adapter.config import PrefixTuningPlusConfig
from prefixtune_cli.adapter.feed_forward import FeedForwardShape, feed_forward_modules
from prefixtune_cli.adapter.layer import FeedForwardMemoryLayer, MemoryLayer
from prefixtune_cli.adapter.memory import Memory
from prefixtune_cli.adapter.model import PrefixTuningPlusModel
from prefixtune_cli.adapter.register import register

register(PrefixTuningPlusConfig, PrefixTuningPlusModel)

__all__ = [
    "AttentionShape",
    "FeedForwardMemoryLayer",
    "FeedForwardShape",
    "Memory",
    "MemoryLayer",
    "PrefixTuningPlusConfig",
    "PrefixTuningPlusModel",
    "UnsupportedModelError",
    "attention_modules",
    "basis_state",
    "feed_forward_modules",
    "fold_basis",
    "identity_basis",
    "initialize_basis",
    "load_basis_state",
    "step_weight",
]
