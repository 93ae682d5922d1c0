"""`ptp chat`: talk to a model at the terminal."""

from __future__ import annotations

from prefixtune_cli.cli import options

HELP = "/reset forgets the conversation, /base and /adapter switch, /quit leaves."


def chat(
    run: options.Run = None,
    model: options.Model = None,
    adapter: options.AdapterFolder = None,
    no_adapter: options.NoAdapter = False,
    system: options.System = None,
    chat_template: options.ChatTemplate = None,
    bits: options.Bits = None,
    device: options.Device = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    seed: options.SamplingSeed = 0,
) -> None:
    """Talk to an adapter, or to the base alone."""
    from prefixtune_cli.cli import console

    console.quiet_libraries()
    from prefixtune_cli import generate as generation

    sampling = generation.Sampling(max_new_tokens, temperature, top_p)
    speaker = generation.load_speaker(
        run=run,
        model=model,
        adapter=adapter,
        no_adapter=no_adapter,
        bits=bits,
        device=device,
        seed=seed,
        chat_template=chat_template,
    )
    console.notice(f"{speaker.description}. {HELP}")
    talk = generation.conversation(None, system)
    while True:
        console.stderr().print("you: ", end="", style="bold")
        try:
            text = input()
        except EOFError:
            return
        match text.strip():
            case "":
                continue
            case "/quit" | "/exit":
                return
            case "/reset":
                talk = generation.conversation(None, system)
                continue
            case "/base" | "/adapter" if not speaker.has_adapter:
                console.notice(f"{speaker.description} has no adapter to switch.")
                continue
            case "/base" | "/adapter" as command:
                speaker.use_adapter = command == "/adapter"
                console.notice(f"{speaker.description}.")
                continue
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
