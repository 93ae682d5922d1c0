"""The private names of libraries that the package uses: each has its reason here, and is still as we read it.

Read in torch 2.13, transformers 5.24, peft 0.21, trl 1.16, accelerate 1.15, lm-eval 0.4.13, on Python 3.11. A test
fails if the package uses a name that this list lacks, or no longer uses one of the list, or if a library has moved a
name or changed its parameters.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import prefixtune_cli

PACKAGE = Path(prefixtune_cli.__file__).parent


class Private(NamedTuple):
    """A private name: its owner, its parameters (None: not a function), and why there is no public way."""

    owner: str
    parameters: str | None
    why: str


TRAINER = "transformers:Trainer"
TUNER = "peft.tuners.tuners_utils:BaseTuner"
LAYER = "peft.tuners.tuners_utils:BaseTunerLayer"
MODEL = "transformers:PreTrainedModel"
SFT = "trl:SFTTrainer"
CLASS_OF_A_TUNER = "abstract in peft: a tuner is made by defining it"
ENUM = "an enum has no public way to get a member more; PEFT's list of methods is one"
A_TRACE = "passes before the first step leave none in what TRL counts"

NAMES = {
    # The adapter is a tuner of peft's.
    "_prepare_model": Private(TUNER, "self, peft_config, model", "chooses the modules; " + CLASS_OF_A_TUNER),
    "_prepare_adapter_config": Private(TUNER, "self, peft_config, model_config", CLASS_OF_A_TUNER),
    "_check_target_module_exists": Private(TUNER, "peft_config, key", CLASS_OF_A_TUNER),
    "_create_and_replace": Private(
        TUNER,
        "self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name",
        CLASS_OF_A_TUNER,
    ),
    "_check_merge_allowed": Private(TUNER, "self", "says in words that M cannot be merged"),
    "_replace_module": Private(
        TUNER, "self, parent, child_name, new_module, child", "an attention module is wrapped where it lies"
    ),
    "_enable_peft_forward_hooks": Private("peft:PeftModel", None, "`adapter_names` reach a tuner by it alone"),
    "_move_adapter_to_device_of_base_layer": Private(
        LAYER, "self, adapter_name, device", "peft's own layers call it for a new adapter"
    ),
    "_get_base_layer_device_and_dtype": Private(
        LAYER, "self, base_layer", "an attention module has no weight that tells its device"
    ),
    "_name_": Private("enum:", None, ENUM),
    "_value_": Private("enum:", None, ENUM),
    "_sort_order_": Private("enum:", None, ENUM),
    "_member_names_": Private("enum:", None, ENUM),
    "_member_map_": Private("enum:", None, ENUM),
    "_value2member_map_": Private("enum:", None, ENUM),
    # Training: checkpoints that appear whole, and the traces of a step.
    "_save_checkpoint": Private(TRAINER, "self, model, trial", "a checkpoint is written beside itself and renamed"),
    "_get_output_dir": Private(TRAINER, "self, trial", "where that part lies"),
    "_save_rng_state": Private(TRAINER, "self, output_dir", "the leader writes for the nodes without its disk"),
    "_load_from_checkpoint": Private(
        TRAINER, "self, resume_from_checkpoint, model", "of a finished run; `train` would add a step"
    ),
    "_get_train_sampler": Private(TRAINER, "self, train_dataset", "the rows' order does not depend on the processes"),
    "_set_signature_columns_if_needed": Private(TRAINER, "self", "keeps the number of a row, by which errors name it"),
    "_signature_columns": Private(TRAINER, None, "as above"),
    "_n_gpu": Private("transformers:TrainingArguments", None, "or DataParallel takes all GPUs"),
    "_metrics": Private(SFT, None, A_TRACE),
    "_total_train_tokens": Private(SFT, None, A_TRACE),
    "_prepare_dataset": Private(
        "trl:DPOTrainer",
        "self, dataset, processing_class, args, dataset_name",
        "pairs come as tokens, which SFTTrainer sees by itself",
    ),
    "_set_sync_gradients": Private(
        "accelerate.state:GradientState", "self, sync_gradients", "`no_sync` does not know sharded models"
    ),
    "_use_triton": Private("trl.trainer.utils:", "device", "the fused head skips tokens without a loss on a CPU, too"),
    "_CHUNKED_LOGPROB_CHUNK_SIZE": Private("trl.trainer.utils:", None, "the fused head's tiles, on a CPU"),
    "_preprocess_mask_arguments": Private(
        "transformers.masking_utils:",
        "config, inputs_embeds, attention_mask, cache, position_ids, layer_idx, encoder_hidden_states",
        "whether a model makes its masks of positions, before its weights are loaded; `ALL_MASK_ATTENTION_FUNCTIONS` "
        "hands out functions of tensors, which some models (gemma4_unified, git) make without content",
    ),
    # Class attributes that have no public name, in which a model describes itself.
    "_is_stateful": Private(MODEL, None, "a model with a recurrent state is not packed"),
    "_no_split_modules": Private(MODEL, None, "the decoder layers, for FSDP"),
    "_keep_in_fp32_modules": Private(MODEL, None, "what a quantizer leaves alone"),
    "_keep_in_fp32_modules_strict": Private(MODEL, None, "what stays in float32"),
    "_supports_attention_backend": Private(MODEL, None, "whether shared prompts can be masked"),
    "_require_grads_hooks": Private(MODEL, None, "whether the embeddings have theirs already"),
    "_is_fsdp_managed_module": Private(
        "transformers.distributed.fsdp:", None, "set by transformers' own sharded loading alone"
    ),
    "_is_distributed_loading_by_transformers": Private(MODEL, None, "as above"),
    "_commit_hash": Private("transformers:PreTrainedConfig", None, "the commit that a hub's model was read at"),
    "_encode_plus": Private(
        "transformers:PreTrainedTokenizerFast", None, "whether a tokenizer class has a call of its own"
    ),
    # Benchmarks.
    "_loglikelihood_tokens": Private(
        "lm_eval.models.huggingface:HFLM", "self, requests, disable_tqdm, override_bs", "lm-eval's seam for scoring"
    ),
    "_encode_pair": Private(
        "lm_eval.api.model:TemplateLM", "self, context, continuation", "lm-eval's own way to cut a question"
    ),
    # Operations of torch as its dispatcher spells them.
    "_grouped_mm": Private("torch.ops.aten:", None, "a mixture's product, which the plan counts"),
    "_local_scalar_dense": Private("torch.ops.aten:", None, "`.item()`, which the plan answers"),
}  # fmt: skip
OF_THE_LANGUAGE = {"_exit", "_replace"}  # documented: os._exit, and _replace of named tuples
OURS = {
    "_forward_in_one_dtype",
    "_looks_for_memories",
    "_prefix_tuning_plus_layer",
}  # set on libraries' objects


@functools.cache
def trees() -> list[ast.AST]:
    files = sorted(PACKAGE.rglob("*.py"))
    return [node for f in files for node in ast.walk(ast.parse(f.read_text(encoding="utf-8")))]


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and name[0] == "_" and name[:2] != "__"


def defined_here() -> set[str]:
    """Names that the package gives to functions, classes, variables and attributes of its own objects."""
    found = set()
    for node in trees():
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store(), value=ast.Name(id="self" | "cls")):
                found.add(name)
    return found


def reached_for() -> set[str]:
    """Private names that the package reads, sets or spells but does not define."""
    found = set()
    ends = {id(part) for node in trees() if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in trees():
        match node:
            case ast.Attribute(attr=name) | ast.Constant(value=name) if id(node) not in ends:
                found.add(name)
            case ast.ImportFrom(names=names):
                found |= {alias.name for alias in names}
    return {name for name in found if is_private(name)} - defined_here()


def overridden() -> set[str]:
    """Private methods of libraries' classes that the package overrides, perhaps in a class to mix in."""
    found = set()
    for module in pkgutil.walk_packages([str(PACKAGE)], "prefixtune_cli."):
        if module.name.endswith(("__main__", "triton_kernels")):
            continue
        for kind in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(kind) and kind.__module__ == module.name:
                ours = [c for c in kind.__mro__ if c.__module__.startswith("prefixtune_cli")]
                bases = [c for c in kind.__mro__ if c not in ours]
                found |= {
                    name
                    for own in ours
                    for name, value in vars(own).items()
                    if is_private(name)
                    and not name.endswith("_")  # those are the enums'
                    and inspect.isfunction(getattr(value, "__func__", value))
                    and any(hasattr(base, name) for base in bases)
                }
    return found


def test_the_list_has_the_private_names_that_the_package_reaches_for_and_none_else() -> None:
    used = reached_for() | overridden() | {"_enable_peft_forward_hooks"}
    assert used - OF_THE_LANGUAGE - OURS == set(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_private_name_is_where_it_was_and_takes_what_it_took(name: str) -> None:
    private = NAMES[name]
    module, _, kind = private.owner.partition(":")
    owner: Any = importlib.import_module("torch").ops.aten if module == "torch.ops.aten" else None
    owner = owner or importlib.import_module(module)
    owner = getattr(owner, kind) if kind else owner
    if private.parameters is not None:
        taken = ", ".join(inspect.signature(getattr(owner, name)).parameters)
        # The name of this parameter differs between versions of transformers.
        assert taken.replace("past_key_values", "cache") == private.parameters
    elif not hasattr(owner, name):
        sources = owner.__mro__[:-1] if inspect.isclass(owner) else [owner]
        assert any(f"{name}" in inspect.getsource(source) for source in sources)
