"""One adapter folded into its base. The result is a plain model, which needs neither peft nor ptp."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefixtune_cli.adapter_folder import check_fits, load_adapter
from prefixtune_cli.errors import AdapterError, ModelError, ResourceError
from prefixtune_cli.gguf_base import load_model
from prefixtune_cli.merge.folder import Merged, claimed, weights_bytes, write_record, written_whole
from prefixtune_cli.merge.source import Source, read_source
from prefixtune_cli.pointed import Pointed
from prefixtune_cli.progress import Reporter
from prefixtune_cli.quantization import stored_settings
from prefixtune_cli.recipe.aliases import resolve as resolve_alias
from prefixtune_cli.recipe.gguf_header import is_gguf
from prefixtune_cli.recipe.schema import ModelSection
from prefixtune_cli.tokenizer import cannot_load, check_base, load_config, load_tokenizer


def merge_into_base(
    adapter: Pointed, *, out: str | Path, overwrite: bool = False, reporter: Reporter
) -> Merged:
    """Fold an adapter into the weights of its base, and write the model and its tokenizer.

    The model has the base's own dtype. A base in a GGUF file becomes a plain folder in bfloat16, or in float32 where
    the run computed in float32.

    Args:
        adapter: of LoRA, or of another method of peft whose layers can be merged.
        out: the model folder to write.
        overwrite: replace what an earlier merge wrote.
        reporter: is told what is done.

    Raises:
        RunDirError: `out` is taken.
        AdapterError: the adapter cannot be folded, or does not fit the base.
        ModelError: the base cannot be found or read, or its weights are quantized.
        ResourceError: there is not enough memory or disk space.
    """
    out = Path(out)
    source = read_source(adapter)
    with claimed(out, [source], overwrite=overwrite):
        record = _write_folded(source, out, reporter)
    following = f'ptp generate --model {shlex.quote(str(out))} --prompt "…"'
    return Merged(out, record, weights_bytes(out), following)


def _write_folded(source: Source, out: Path, reporter: Reporter) -> dict[str, Any]:
    """Check and fold the adapter, and write the model; returns what its merge.json holds."""
    _check_foldable(source)
    section = source.base
    check_base(section)
    if stored_settings(load_config(section)) is not None:
        raise ModelError(
            f"{section.name} is quantized, and quantized weights cannot take up an adapter without a loss. Fold it "
            f"into the model that {section.name} was made from, with --model NAME."
        )
    check_fits(section, source.folder)
    tokenizer = load_tokenizer(section, source.folder)
    if section.bits in (4, 8):
        reporter.notice(
            f"The run trained on {section.name} at {section.bits} bits. The adapter is folded into the weights that "
            "these were made from, so the model differs from the run's by their quantization."
        )
    reporter.notice(f"Loading {section.name}.")
    model = _folded(source, reporter)
    reporter.notice(f"Writing {out}.")
    with written_whole(out) as part:
        model.save_pretrained(str(part))
        tokenizer.save_pretrained(str(part))
        return write_record(part, [source], method="into-base")


def _check_foldable(source: Source) -> None:
    if source.method == "prefix-tuning-plus":
        raise AdapterError(
            f"{source.given} cannot be folded into its base: its method is prefix-tuning-plus, where φ is not linear "
            "and the query depends on the token's position, so no weight matrix gives φ(q)ᵀM. Keep the adapter beside "
            "the base; `ptp export` (planned) will hand out both together."
        )
    if source.config.is_prompt_learning:
        raise AdapterError(
            f"{source.given} cannot be folded into its base: its method is {source.method}, whose trained vectors "
            "stand before the input, so no weight of the base can hold them. Keep the adapter beside the base."
        )


def _folded(source: Source, reporter: Reporter) -> PreTrainedModel:
    base = _load(source.base)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    embeddings = {name for name, module in base.named_modules() if module in ends}
    tied = ends[1] is not None and ends[0].weight is ends[1].weight
    model = load_adapter(base, source.folder)
    if tied and (adapted := embeddings.intersection(getattr(model, "targeted_module_names", ()))):
        # The adapter changes one of two modules that share a weight, or each of them differently.
        ends[1].weight = nn.Parameter(ends[1].weight.detach().clone(), requires_grad=False)
        base.config.get_text_config().tie_word_embeddings = False
        reporter.notice(
            f"{source.given} adapts {' and '.join(sorted(adapted))}. {source.base.name} has one weight for its "
            "embedding and its output layer; the merged model has one for each."
        )
    try:
        folded = cast(PeftModel, model).merge_and_unload(safe_merge=True)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise AdapterError(
            f"{source.given} cannot be folded into its base: its method is {source.method}, and peft says: {error}"
        ) from error
    left = [name for name, module in folded.named_modules() if isinstance(module, BaseTunerLayer)]
    if left:
        raise AdapterError(
            f"{source.given} cannot be folded into its base: it has two kinds of changes at {left[0]}, of which peft "
            "folds one. Keep the adapter beside the base."
        )
    return cast(PreTrainedModel, folded)


def _load(section: ModelSection) -> PreTrainedModel:
    """Load the base in its own dtype into main memory."""
    name = resolve_alias(section.name)
    try:
        if is_gguf(name):
            dtype = torch.float32 if section.bits == 32 else torch.bfloat16
            model, loaded = load_model(name, load_config(section), dtype=dtype)
        else:
            model, loaded = AutoModelForCausalLM.from_pretrained(
                name,
                revision=section.revision,
                trust_remote_code=section.trust_remote_code,
                dtype="auto",
                output_loading_info=True,
            )
    except MemoryError as error:
        raise ResourceError(f"{section.name} does not fit into the memory.") from error
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(cannot_load("model", section, error)) from error
    if missing := sorted(loaded["missing_keys"]):
        raise ModelError(
            f"{section.name} lacks {len(missing)} of its weights, first {missing[0]}: they would be random."
        )
    return cast(PreTrainedModel, model.eval().requires_grad_(False).to(torch.device("cpu")))
