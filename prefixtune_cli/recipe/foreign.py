"""The names that settings have in TRL, transformers, LLaMA-Factory and Axolotl, and our names for them.

Flags (`--output-dir`) and keys of a recipe (`output_dir`) are both looked up here.
"""

from __future__ import annotations

# Their name → our key, with a value if their name implies one; or our flag if it is not a setting.
COUNTERPARTS = {
    "output_dir": "out",
    "config": "--recipe",
    "resume_from_checkpoint": "--resume",
    "auto_resume_from_checkpoints": "--resume auto",
    "overwrite_output_dir": "--overwrite",
    # model
    "model_name_or_path": "model.name",
    "model_name": "model.name",
    "model_id": "model.name",
    "base_model": "model.name",
    "pretrained_model_name_or_path": "model.name",
    "model_revision": "model.revision",
    "revision_of_model": "model.revision",
    "load_in_4bit": "model.bits=4",
    "load_in_8bit": "model.bits=8",
    "quantization_bit": "model.bits",
    "bf16": "model.bits=16",
    "fp16": "model.bits=16",
    "torch_dtype": "model.bits",
    "dtype": "model.bits",
    "attn_implementation": "model.attention",
    "flash_attn": "model.attention=flash_attention_2",
    "flash_attention": "model.attention=flash_attention_2",
    # data
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "dataset_path": "data.train",
    "data_path": "data.train",
    "train_file": "data.train",
    "eval_dataset": "data.eval",
    "test_datasets": "data.eval",
    "validation_file": "data.eval",
    "val_size": "data.eval_split",
    "val_set_size": "data.eval_split",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "model_max_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "train_on_inputs": "data.train_on=all",
    "train_on_prompt": "data.train_on=all",
    "completion_only_loss": "data.train_on=completion",
    "assistant_only_loss": "data.train_on=completion",
    "template": "data.chat_template",
    "chat_template_path": "data.chat_template",
    # adapter
    "finetuning_type": "adapter.method",
    "peft_type": "adapter.method",
    "use_peft": "adapter.method=lora",
    "adapter_name_or_path": "train.start_from",
    "lora_model_dir": "train.start_from",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "lora_target_linear": "adapter.target_modules=all-linear",
    "use_dora": "adapter.config.use_dora",
    "use_rslora": "adapter.config.use_rslora",
    "pissa_init": "adapter.config.init_lora_weights",
    # training
    "stage": "train.objective",
    "rl": "train.objective",
    "pref_loss": "train.objective",
    "pref_beta": "train.beta",
    "rl_beta": "train.beta",
    "simpo_gamma": "train.gamma",
    "orpo_alpha": "train.beta",
    "kto_chosen_weight": "train.desirable_weight",
    "kto_rejected_weight": "train.undesirable_weight",
    "kto_desirable_weight": "train.desirable_weight",
    "kto_undesirable_weight": "train.undesirable_weight",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "per_device_train_batch_size": "train.batch_size",
    "per_device_batch_size": "train.batch_size",
    "train_batch_size": "train.batch_size",
    "micro_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "evaluate.batch_size",
    "eval_batch_size": "evaluate.batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule",
    "warmup_steps": "train.warmup_ratio",
    "max_grad_norm": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "optim": "train.optimizer",
    "sample_packing": "train.packing",
    "group_by_length": "train.group_by_length",
    "auto_find_batch_size": "train.auto_batch",
    "logging_steps": "train.log_steps",
    "eval_steps": "train.eval_steps",
    "save_total_limit": "train.keep_checkpoints",
    "report_to": "train.track",
    "nproc_per_node": "train.gpus",
    "num_processes": "train.gpus",
    "deepspeed": "train.parallel=deepspeed-zero2",
    "fsdp": "train.parallel=fsdp",
}
# How ours differs from theirs.
NOTES = {
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit", "train_on_inputs", "train_on_prompt", "use_peft"),
        "if it is true; otherwise leave it out",
    ),
    **dict.fromkeys(("stage", "rl", "pref_loss"), "sft, dpo, simpo, orpo or kto"),
    "warmup_steps": "a fraction of all steps",
    "bf16": "which is bfloat16, and the default",
    "fp16": "which is bfloat16, and the default",
    "torch_dtype": "16 for bfloat16, 32 for float32",
    "dtype": "16 for bfloat16, 32 for float32",
    "template": "a Jinja file; without it, the tokenizer's own is used",
    "deepspeed": "or deepspeed-zero3, without a file",
}
# Their settings without a counterpart here, and why.
NEEDLESS = {
    **dict.fromkeys(
        ("do_train", "do_eval", "task_type", "load_in_16bit"),
        "`ptp train` always fine-tunes, and evaluates at the end",
    ),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy", "save_strategy", "logging_strategy", "plot_loss"),
        "the steps between them decide it: train.eval_steps, train.save_steps, train.log_steps",
    ),
    **dict.fromkeys(
        "preprocessing_num_workers dataloader_num_workers dataset_num_proc dataset_processes ddp_timeout "
        "overwrite_cache dataset_prepared_path tf32 strict".split(),
        "ptp decides it itself",
    ),
    **dict.fromkeys(
        ("run_name", "logging_dir", "wandb_project", "wandb_entity", "wandb_name", "wandb_run_id"),
        "a run is named by its folder, `out`; a tracker reads its own environment variables",
    ),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy"), "ptp sends nothing anywhere"),
    **dict.fromkeys(
        ("special_tokens", "tokenizer_type", "model_type", "tokenizer_name", "pad_to_sequence_len"),
        "the base's folder says it",
    ),
}


def counterpart(name: str) -> str | None:
    """Our name for theirs: a key, a key with its value as in model.bits=4, or a flag; None if theirs is unknown."""
    return COUNTERPARTS.get(name.replace("-", "_"))


def why_needless(name: str) -> str | None:
    """Why one of theirs has no counterpart; None if it is unknown."""
    return NEEDLESS.get(name.replace("-", "_"))


def note(name: str) -> str:
    """How ours differs from theirs, after a comma; empty if it does not."""
    found = NOTES.get(name.replace("-", "_"))
    return f", {found}" if found else ""


def in_a_recipe(path: str) -> str | None:
    """A sentence about a key of theirs in a recipe; None if it is unknown."""
    name = path.rpartition(".")[2]
    if reason := why_needless(name):
        return f"{path} has no counterpart here: {reason}. Leave it out"
    ours = counterpart(name)
    if ours is None or ours == path:
        return None
    if ours.startswith("--"):
        return f"{path} is not a setting here: type {ours} after `ptp train`"
    return f"{path} is {ours.replace('=', ': ')} here{note(name)}"
