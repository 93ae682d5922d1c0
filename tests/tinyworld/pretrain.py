"""Trains the tokenizer and the base model `tiny` on the grammar's text.

    python -m tests.tinyworld.pretrain --out prefixtune_cli/assets/tiny --seed 0

Matrices inside the layers learn by Muon, everything else by AdamW, under bf16 autocast with fp32
master weights; the files hold bf16. The shipped model is what the command above writes: 2.6 M
parameters, 1200 steps of 4096 tokens (4.9 M), 18 minutes on two shared cores at 4,500 tokens/s,
loss 1.11 on held-out text. The same seed gives the same weights on the same kind of processor.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tinyworld.dialogue import ASSISTANT, END, SYSTEM, USER
from tests.tinyworld.grammar import documents

PAD, BOS = "<|pad|>", "<|bos|>"
SPECIAL_TOKENS = (PAD, BOS, END, SYSTEM, USER, ASSISTANT)
VOCABULARY_SIZE = 2048
CONTEXT_LENGTH = 1024
TOKENS_PER_STEP = 4096
SHORT_LENGTH = 256
LONG_EVERY = 10  # steps: this one is on rows of the full context length
TOKENIZER_DOCUMENTS = 20_000
MUON_LR = 8e-3
ADAMW_LR = 5e-3
WORKERS = 2

CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}"
    "{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(seed: int, document_count: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the whole byte alphabet, one token a digit; adds no token by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(documents(seed), document_count), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def model_config(vocabulary_size: int) -> LlamaConfig:
    """A Llama with grouped-query attention: four query heads of 64, two key and value heads."""
    return LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(END),
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[int]:
    """The grammar's documents as one stream of token ids, each document after a BOS."""
    texts = documents(seed)
    while True:
        batch = [BOS + text for text in islice(texts, 2000)]
        for ids in tokenizer(batch, add_special_tokens=False)["input_ids"]:
            yield from ids


def rows(stream: Iterator[int], length: int) -> torch.Tensor:
    """[rows, length] int64: the next TOKENS_PER_STEP tokens of the stream."""
    ids = torch.tensor(list(islice(stream, TOKENS_PER_STEP)))
    return ids.view(-1, length)


def next_token_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token; ids: [rows, length]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def learning_rate_factor(step: int, steps: int) -> float:
    """Warm up over 2 % of the steps, then a cosine down to 2 %."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inner, lr=MUON_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class ShardedGradients:
    """The gradient of a batch, each shard's computed in a thread of its own on one core.

    Two lone threads share a busy machine without waiting for each other inside every operation,
    as the threads of one operation do. The shards are added in order: the result is deterministic.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.parameters = list(model.parameters())
        self.pool = ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, ids: torch.Tensor) -> float:
        """Set the gradient of the mean loss on ids, [rows, length], and return that loss."""
        shards = list(self.pool.map(self._shard, ids.chunk(WORKERS)))
        for index, parameter in enumerate(self.parameters):
            parameter.grad = torch.stack([gradient[index] for _, gradient in shards]).mean(0)
        return sum(loss for loss, _ in shards) / WORKERS

    def _shard(self, ids: torch.Tensor) -> tuple[float, tuple[torch.Tensor, ...]]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(self.model, ids)
        return loss.item(), torch.autograd.grad(loss, self.parameters)


def train(model: LlamaForCausalLM, stream: Iterator[int], steps: int, out: Path) -> None:
    """Train for `steps` steps, printing the loss and saving the weights on the way."""
    both = optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: learning_rate_factor(step, steps))
        for each in both
    ]
    gradients = ShardedGradients(model)
    model.train()
    started = time.monotonic()
    for step in range(1, steps + 1):
        length = SHORT_LENGTH if step % LONG_EVERY else CONTEXT_LENGTH
        loss = gradients(rows(stream, length))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each, schedule in zip(both, schedules, strict=True):
            each.step()
            schedule.step()
            each.zero_grad()
        if step % 20 == 0 or step == steps:
            speed = step * TOKENS_PER_STEP / (time.monotonic() - started)
            print(f"step {step}/{steps}  loss {loss:.4f}  {speed:.0f} tokens/s", flush=True)
        if step % 200 == 0:
            save_weights(model, out)


def save_weights(model: LlamaForCausalLM, out: Path) -> None:
    """Write the weights in bf16, leaving the model in fp32."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    del state["lm_head.weight"]  # tied to the embedding
    config = LlamaConfig(**model.config.to_dict())
    with torch.device("meta"):
        shell = LlamaForCausalLM(config).to(torch.bfloat16)
    shell.config.dtype = torch.bfloat16
    shell.generation_config = model.generation_config
    shell.save_pretrained(out, state_dict=state)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: Iterator[int], batches: int) -> float:
    """Mean loss over `batches` batches of text the model has not seen."""
    model.eval()
    losses = [next_token_loss(model, rows(stream, SHORT_LENGTH)).item() for _ in range(batches)]
    return sum(losses) / len(losses)


def pretrain(out: Path, seed: int, steps: int, tokenizer_documents: int) -> float:
    """Make tokenizer and model, write both to `out`, and return the held-out loss."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(seed, tokenizer_documents)
    tokenizer.save_pretrained(out)
    model = LlamaForCausalLM(model_config(len(tokenizer)))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=64,
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    train(model, token_stream(tokenizer, seed), steps, out)
    save_weights(model, out)
    return held_out_loss(model, token_stream(tokenizer, seed + 1), batches=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200)
    arguments = parser.parse_args()
    loss = pretrain(arguments.out, arguments.seed, arguments.steps, TOKENIZER_DOCUMENTS)
    print(json.dumps({"held_out_loss": round(loss, 4)}))


if __name__ == "__main__":
    main()
