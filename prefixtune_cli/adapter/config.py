"""The configuration of Prefix-Tuning+, as PEFT stores it in adapter_config.json."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from prefixtune_cli.adapter.feature_map import MAPS

SITES = ("attention", "ffn", "attention+ffn")
FORMAT_VERSION = 2


@dataclass
class PrefixTuningPlusConfig(PeftConfig):
    """What M is, and where it is read (arXiv 2506.13674, eq. 7).

    Args:
        feature_map: φ: `elu` (the paper's default), `gelu`, or `mlp`, φ_W(q) = ReLU(Wq + b) with trained W and b.
        feature_dim: features per head of `mlp`; None is the query's width. The other maps have the query's width.
        normalize_query: φ sees the query divided by its root mean square over the head. The paper has this off.
        sites: where M is read: `attention` (the paper's form), `ffn`, or `attention+ffn`. The FFN's queries are the
            blocks of its input: feature_map, feature_dim, normalize_query and rank mean the same there. Only layers
            that have attention are adapted at either site.
        block_size: width of a block of the FFN's input and output, which it must divide; None is the width of a query
            head, or else the largest divisor below it.
        rank: rank of each M, trained as the product M_down·M_up; None trains M whole.
        share_heads: `query` trains one M per query head, `kv` one per key/value head, which its query heads share;
            for attention only.
        layers: `all`, a list of decoder layer numbers, or `last:k`.
        target_modules: attention modules and FFNs to adapt, by name as elsewhere in PEFT; None is all that `sites`
            and `layers` allow.
        modules_to_save: other modules to train and save, as elsewhere in PEFT.
        basis_epsilon: ε of the basis in which M is trained after a call of `initialize_basis`. It is not saved, as an
            adapter holds only M.
        init_weights: M starts at zero, so a fresh adapter changes nothing. False draws it at random, for tests.
        format_version: version of the adapter's file format. A version that is too new for this code is refused. It is
            the lowest version that knows the settings (`sites` and `rank` are of version 2).

    Raises:
        ValueError: a value is out of its range; the message gives the rule and the value received.
    """

    feature_map: str = field(default="elu", metadata={"help": "φ of eq. 7: elu, gelu or mlp."})
    feature_dim: int | None = field(default=None, metadata={"help": "Features per head of mlp."})
    normalize_query: bool = field(
        default=False, metadata={"help": "Divide the query by its root mean square."}
    )
    share_heads: str = field(
        default="query", metadata={"help": "One M per query head, or one per kv head."}
    )
    sites: str = field(
        default="attention", metadata={"help": "Where M is read: attention, ffn or attention+ffn."}
    )
    block_size: int | None = field(
        default=None, metadata={"help": "Width of a block of the FFN's input."}
    )
    rank: int | None = field(default=None, metadata={"help": "Rank of each M."})
    layers: str | list[int] = field(
        default="all", metadata={"help": "all, a list of layer numbers, or last:k."}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Attention modules and FFNs, by name."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train and save."}
    )
    basis_epsilon: float = field(
        default=0.01, metadata={"help": "Floor of the basis, as a share of the mean eigenvalue."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Start M at zero."})
    format_version: int = field(default=1, metadata={"help": "Version of the adapter's format."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING_PLUS
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"This adapter has format version {self.format_version}, and this version of prefixtune-cli reads up "
                f"to {FORMAT_VERSION}. Update it: pip install --upgrade prefixtune-cli"
            )
        if self.feature_map not in tuple(MAPS):
            *names, last = MAPS
            raise ValueError(
                f"feature_map must be {', '.join(names)} or {last}, got {self.feature_map!r}."
            )
        if self.feature_dim is not None and not MAPS[self.feature_map].is_trained:
            raise ValueError(
                f"feature_dim belongs to feature_map 'mlp', got feature_dim={self.feature_dim} with "
                f"{self.feature_map!r}, whose features have the query's width."
            )
        if self.share_heads not in ("query", "kv"):
            raise ValueError(f"share_heads must be query or kv, got {self.share_heads!r}.")
        for name in ("feature_dim", "block_size", "rank"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number above 0, got {value!r}.")
        if not self.basis_epsilon > 0:
            raise ValueError(f"basis_epsilon must be above 0, got {self.basis_epsilon!r}.")
        self._check_sites()
        self._check_layers()
        self.format_version = 2 if self.sites != "attention" or self.rank is not None else 1

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = super().to_dict()
        del found["basis_epsilon"]
        return found

    def _check_sites(self) -> None:
        if self.sites not in SITES:
            raise ValueError(f"sites must be attention, ffn or attention+ffn, got {self.sites!r}.")
        if self.block_size is not None and self.sites == "attention":
            raise ValueError(
                f"block_size belongs to sites 'ffn' and 'attention+ffn', got block_size={self.block_size} with "
                "'attention', whose M have the heads' widths."
            )
        if self.share_heads == "kv" and self.sites == "ffn":
            raise ValueError(
                "share_heads belongs to sites 'attention' and 'attention+ffn', got share_heads='kv' with 'ffn', "
                "which has no heads."
            )

    def _check_layers(self) -> None:
        if isinstance(self.layers, str):
            valid = self.layers == "all" or re.fullmatch(r"last:[1-9]\d*", self.layers) is not None
        elif isinstance(self.layers, Iterable):
            self.layers = list(self.layers)
            numbers = [layer for layer in self.layers if type(layer) is int and layer >= 0]
            valid = len(set(numbers)) == len(self.layers) > 0
        else:
            valid = False
        if not valid:
            raise ValueError(
                "layers must be all, a list of layer numbers such as [0, 1], each once, or last:k with k above 0, "
                f"got {self.layers!r}."
            )
