"""`ptp chat`: talk to a model at the terminal."""

from __future__ import annotations

import re
import sys
from typing import Any

from prefixtune_cli.cli import arguments, lookup, typer_options
from prefixtune_cli.errors import UsageError

HELP = "/base and /adapter switch, each to its own conversation; /reset forgets both, /help prints this, /quit leaves."


def chat(
    run: typer_options.Run = None,
    model: str | None = None,
    adapter: typer_options.AdapterFolder = None,
    no_adapter: typer_options.NoAdapter = False,
    system: typer_options.System = None,
    chat_template: str | None = None,
    bits: int | None = None,
    device: str | None = None,
    max_new_tokens: typer_options.MaxNewTokens = 256,
    temperature: typer_options.Temperature = 0.0,
    top_p: typer_options.TopP = 1.0,
    seed: typer_options.SamplingSeed = 0,
) -> None:
    """Talk to an adapter, or to the base alone."""
    from prefixtune_cli.cli import console
    from prefixtune_cli.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p)
    who = lookup.one(run, model, adapter, chat_template=chat_template, bits=bits, device=device)
    console.quiet_libraries()
    from prefixtune_cli import generate as generation

    speaker = generation.load_speaker(
        who, no_adapter=no_adapter, seed=seed, chat_template=chat_template
    )
    console.notice(f"{speaker.description}. {HELP}")
    at_terminal = sys.stdin.isatty()

    def begun() -> dict[bool, Any]:
        """Two conversations, with the adapter and without: neither model sees the other's answers."""
        return {side: generation.conversation(None, system) for side in (True, False)}

    talks = begun()
    while True:
        if at_terminal:
            console.stderr().print("you: ", end="", style="bold")
        try:
            text = arguments.stdin_text(input)
        except EOFError:
            return
        except UsageError as error:
            if not at_terminal:
                raise
            console.notice(str(error))
            continue
        match text.strip():
            case "":
                continue
            case "/quit" | "/exit":
                return
            case "/help":
                console.notice(HELP)
                continue
            case "/reset":
                talks = begun()
                continue
            case "/base" | "/adapter" if not speaker.has_adapter:
                console.notice(f"{speaker.description} has no adapter to switch.")
                continue
            case "/base" | "/adapter" as command:
                speaker.use_adapter = command == "/adapter"
                console.notice(f"{speaker.description}.")
                continue
            case unknown if re.fullmatch(r"/[a-z]+", unknown):
                console.notice(f"There is no {unknown}. {HELP}")
                continue
        talk = talks[speaker.use_adapter]
        talk.messages.append({"role": "user", "content": text})
        answer = ""
        pieces = generation.answer_streamed(speaker, talk, sampling=sampling)
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
                answer += piece
        except KeyboardInterrupt:  # ends the answer, not the chat
            pieces.close()
        print()
        talk.messages.append({"role": "assistant", "content": answer})
