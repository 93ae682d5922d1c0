"""Fine-tune large language models by Prefix-Tuning+ (arXiv 2506.13674): the package behind `ptp`.

A recipe goes in, a run directory comes out, and most other commands read run directories. The rooms, from
below: each imports only what stands before it in this list, and tests/test_layers.py holds them to it.

1. What needs nothing above it
    errors          the errors that a user can cause, with what to type instead and their exit codes
    lock            no two commands write to one folder at once
    run_dir         a run's folder: its names, files written beside themselves and renamed, sealed checkpoints
    progress        how work tells where it stands: `Reporter`
    sampling        how an answer's tokens are chosen
    smoothing       curves of losses for pictures
2. What was meant
    recipe/         every setting with its default and its help, in schema/; recipes, flags and `--set` become one;
                    foreign names
    run_list        the runs below a folder
    pointed         a run, a checkpoint, an adapter folder or a base: which of them a path or a name is
3. The method, the data, the machine
    adapter/        Prefix-Tuning+ as a PEFT method: φ, M, its read with Triton kernels, the two sites, the basis
    data/           files and hub data sets become rows, conversations, pairs, and tokens with labels
    parallel/       devices, processes, the launcher, sharding
4. The model
    gguf_base       a base in a GGUF file
    tokenizer       a base's configuration and tokenizer, checked and loaded: what looking at data needs
    quantization    4, 8, 16 and 32 bits
    optimizer       optimizers by name, as transformers' trainer makes them
    peft_methods    the methods of PEFT that can be trained here
    model           the base, with fresh adapters attached
    adapter_folder  an adapter folder on its base, if it fits
    shared_base     one base for many runs
    agreement       whether a model generates what it computes
    answer_file     the file that `ptp generate` writes
5. What is done with it
    plan/           what a recipe takes of memory, and what to change if it does not fit
    generate        answers, in batches or streamed
    evaluate/       losses, answers and preferences on held-out rows, own data and benchmarks, with intervals
    train/          the trainers of answers and of preferences, their checkpoints, stops and warnings
    merge/          one adapter from several; an adapter in its base
    merge_info/     what an adapter is worth before it is deployed or combined
6. What is learned from several runs
    compare/        methods against each other, fairly; the search for a learning rate; speed
    report/         a comparison as one page of HTML
7. What the user sees
    cli/            one file a command, and what they share; nothing but it prints
8. How it starts
    __main__        `python -m prefixtune_cli` is `ptp`

`assets/` has the model `tiny` and the sample data, which tests/tinyworld makes from code, and the shapes of some bases.
"""

import os

__version__ = "0.1.0"

# TRL and huggingface_hub count their users; a run of ours makes no network call that nobody asked for.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
