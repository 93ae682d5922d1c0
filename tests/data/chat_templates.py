"""Small chat templates of common model families, and texts to train a tokenizer on."""

from __future__ import annotations

SENTENCES = [
    "What is the capital of France? The capital of France is Paris.",
    "Sort the message: the card was charged twice. Answer: payment.",
    "user assistant system human gpt hello world, how are you today? Fine, thanks.",
    "Grüße aus Köln, wie geht es dir? ☃ 😀 naïve café",
]
SPECIAL = (
    "<|begin|> <|end_of_text|> <|start_header|> <|end_header|> <|eot_id|> <|im_start|> <|im_end|> "
    "<s> </s> [INST] [/INST] <|user|> <|assistant|> <|end|>"
).split()

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin|>{% for m in messages %}<|start_header|>{{ m.role }}<|end_header|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header|>assistant<|end_header|>\n\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.index0 % 2 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
    " {{ m.content }}</s>{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# An end-of-text after the last turn, as in Phi: no rendered beginning is a prefix of the whole.
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|end_of_text|>{% endif %}"
)
# No token after an answer.
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "marked": MARKED,
    "phi": PHI,
    "bare": BARE,
}
END_OF_TURN = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "marked": "<|im_end|>",
    "phi": "<|end|>",
    "bare": "<|end_of_text|>",
}
