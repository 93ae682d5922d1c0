"""One adapter from several. `_skeleton` stands for the base, so none of its weights are loaded.

`adapter/arithmetic.py` merges Prefix-Tuning+ adapters, and peft merges LoRA adapters. The update of a LoRA is the
product BA. peft's `cat` puts the factors of several side by side: their product is exactly the sum of the updates, and
its rank is the sum of the ranks. peft's `linear` averages the As and the Bs separately, which does not give the average
of the updates, so it is not used. TIES and DARE are defined on the updates: peft applies them to BA, and a singular
value decomposition brings the result back to low rank (`ties_svd` and `dare_linear_svd`).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixtune_cli import model as models
from prefixtune_cli.adapter import PrefixTuningPlusConfig
from prefixtune_cli.adapter.arithmetic import differing_setting
from prefixtune_cli.adapter_folder import check_fits, copies_of_base, stored_shapes
from prefixtune_cli.errors import AdapterError
from prefixtune_cli.merge.folder import Merged, claimed, weights_bytes, write_record, written_whole
from prefixtune_cli.merge.methods import DENSITY, METHODS, PRUNING, checked_weights
from prefixtune_cli.merge.source import Source, check_mergeable, read_source
from prefixtune_cli.pointed import Pointed, base_key
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.aliases import resolve as resolve_alias
from prefixtune_cli.recipe.schema import ModelSection
from prefixtune_cli.tokenizer import carries_tokenizer, check_base, load_tokenizer

MERGED = "default"  # peft writes the adapter of this name into the folder itself


def merge(
    adapters: Sequence[Pointed],
    *,
    out: str | Path,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    seed: int = 0,
    overwrite: bool = False,
    reporter: Reporter,
) -> Merged:
    """Merge several adapters into one, and write it.

    Args:
        adapters: two or more, of one base and one method.
        out: the adapter folder to write.
        method: one of METHODS.
        weights: one for each adapter. None is 1/n each for linear and dare, and 1 each for task-arithmetic,
            which adds, and for ties, which averages by itself.
        density: the fraction of entries that ties and dare keep; None is DENSITY.
        seed: decides which entries dare drops.
        overwrite: replace what an earlier merge wrote.
        reporter: is told what is done.

    Raises:
        UsageError: the settings contradict each other, or do not fit the number of adapters.
        RunDirError: `out` is taken.
        AdapterError: the adapters do not fit each other or their base, or their method cannot be merged.
        ModelError: the base's configuration cannot be found.
    """
    out = Path(out)
    scales = checked_weights(len(adapters), method, weights, density)
    sources = [read_source(found) for found in adapters]
    with claimed(out, sources, overwrite=overwrite):
        _check_fit_each_other(sources)
        section = sources[0].base
        check_base(section)
        for source in sources:
            check_fits(section, source.folder)
        record = _write_merged(sources, out, method, scales, density, seed, reporter)
    base, folder = shlex.quote(section.name), shlex.quote(str(out))
    following = f'ptp generate --model {base} --adapter {folder} --prompt "…"'
    return Merged(out, record, weights_bytes(out), following)


def _write_merged(
    sources: Sequence[Source],
    out: Path,
    method: str,
    scales: list[float],
    density: float | None,
    seed: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """Merge the adapters and write the result; returns what its merge.json holds."""
    section, tokenizer = sources[0].base, _tokenizer(sources, reporter)
    is_lora = sources[0].method == "lora"
    combination = METHODS[method][is_lora]
    kept = (DENSITY if density is None else density) if method in PRUNING else None
    if is_lora and method in PRUNING:
        reporter.notice(
            f"{method} is taken of each layer's update BA, and brought back to A and B by an SVD."
        )
    reporter.notice(f"Merging {len(sources)} adapters on the skeleton of {section.name}.")
    model = _with_adapters(_skeleton(section), sources)
    names = _names(sources)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if is_lora:
                _merge_loras(model, names, scales, combination, kept)
            else:
                model.base_model.add_weighted_adapter(names, scales, MERGED, combination, kept)
        except ValueError as error:
            raise AdapterError(_with_folders(f"{error}", sources)) from error
    merged = model.peft_config[MERGED]
    merged.base_model_name_or_path, merged.revision = resolve_alias(section.name), section.revision
    with written_whole(out) as part:
        model.save_pretrained(str(part), selected_adapters=[MERGED], save_embedding_layers=False)
        models.drop_model_card(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(part))
        return write_record(
            part,
            sources,
            method=method,
            combination_type=combination,
            weights=scales,
            density=kept,
            seed=seed if method == "dare" else None,
        )


def _check_fit_each_other(sources: Sequence[Source]) -> None:
    """Raise AdapterError where an adapter cannot be merged at all, or for the first difference between two."""
    first, *others = sources
    if len({source.folder.resolve() for source in sources}) < len(sources):
        raise AdapterError(
            "An adapter is given twice. Give each once, and its weight with --weights."
        )
    for source in sources:
        check_mergeable(source)
    for other in others:
        if first.method != other.method:
            raise AdapterError(_differ(first, other, "method", first.method, other.method))
        mine, theirs = base_key(first.base), base_key(other.base)
        if mine != theirs:
            raise AdapterError(_differ(first, other, "base", mine, theirs))
        if isinstance(first.config, PrefixTuningPlusConfig):
            config = cast(PrefixTuningPlusConfig, other.config)
            if found := differing_setting(first.config, config):
                raise AdapterError(_differ(first, other, *found))


def _tokenizer(sources: Sequence[Source], reporter: Reporter) -> PreTrainedTokenizerBase | None:
    """The tokenizer, with its chat template, that is saved with the merged adapter; None where no source has one.

    Raises:
        AdapterError: the sources' tokenizers differ, so one id would mean several tokens.
    """
    if not any(carries_tokenizer(source.folder) for source in sources):
        return None
    first, *others = [load_tokenizer(source.base, source.folder) for source in sources]
    vocabulary = first.get_vocab()
    for source, other in zip(sources[1:], others, strict=True):
        if (theirs := other.get_vocab()) != vocabulary:
            counts = (f"{len(one):,} tokens" for one in (vocabulary, theirs))
            raise AdapterError(_differ(sources[0], source, "their tokenizers", *counts))
        if other.chat_template != first.chat_template:
            reporter.warning(
                f"{source.given} was trained with another chat template than {sources[0].given}, whose template the "
                "merged adapter carries. --chat-template FILE of generate, chat and eval takes another."
            )
    return first


def _differ(first: Source, other: Source, what: str, mine: object, theirs: object) -> str:
    return (
        f"{first.given} and {other.given} cannot be merged, as they differ in {what}: {mine} in the first, and "
        f"{theirs} in the second."
    )


def _skeleton(section: ModelSection) -> PreTrainedModel:
    """The base without its weights, on the CPU: each weight is one number in every entry, and takes no memory.

    The number is a float32, so peft computes adapters in float32, whatever the base's dtype is.

    Raises:
        ModelError: see `model.skeleton`.
    """
    base = models.skeleton(section)
    for module in base.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            hollow = torch.zeros((), dtype=torch.float32).expand(weight.shape)
            module.register_parameter(name, nn.Parameter(hollow, requires_grad=False))
    base.config.name_or_path = base.name_or_path = resolve_alias(section.name)
    return base


def _names(sources: Sequence[Source]) -> list[str]:
    return [f"source_{i}" for i in range(len(sources))]


def _with_folders(message: str, sources: Sequence[Source]) -> str:
    for name, source in zip(_names(sources), sources, strict=True):
        message = message.replace(f"'{name}'", source.given)
    return message


def _with_adapters(base: PreTrainedModel, sources: Sequence[Source]) -> PeftModel:
    for source in sources:
        _make_room(base, source)
    first, *others = zip(_names(sources), sources, strict=True)
    model = PeftModel.from_pretrained(
        base, str(first[1].folder), adapter_name=first[0], config=first[1].config
    )
    for name, source in others:
        model.load_adapter(str(source.folder), adapter_name=name, torch_device="cpu")
    return cast(PeftModel, model)


def _make_room(base: PreTrainedModel, source: Source) -> None:
    """Allocate the weights of which the adapter has copies, as peft reads the copies into them."""
    copies = copies_of_base(stored_shapes(source.folder), (), base.state_dict())
    for name in copies.values():
        module, _, parameter = name.rpartition(".")
        owner = base.get_submodule(module)
        room = torch.zeros(owner.get_parameter(parameter).shape)
        owner.register_parameter(parameter, nn.Parameter(room, requires_grad=False))


def _merge_loras(
    model: PeftModel,
    names: Sequence[str],
    weights: Sequence[float],
    combination: str,
    density: float | None,
) -> None:
    """Add the merged LoRA. peft sets its scale to 1, which rank-stabilised scaling would change."""
    settings = cast(LoraConfig, model.peft_config[names[0]])
    settings.use_rslora, settings.init_lora_weights = False, True
    options: dict[str, Any] = {}
    if density is not None:
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        most = min(min(layer.in_features, layer.out_features) for layer in layers)
        ranks = max(sum(layer.r.get(name, 0) for name in names) for layer in layers)
        options = {"svd_rank": min(ranks, most), "svd_full_matrices": False, "density": density}
    model.base_model.add_weighted_adapter(
        list(names), list(weights), MERGED, combination_type=combination, **options
    )
