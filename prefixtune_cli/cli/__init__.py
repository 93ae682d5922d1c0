"""The command line: one file a command, which talks to the user and calls one function of the rooms below.

What commands share: `flags` declares the flags of a recipe, `typer_options` turns flags into Typer's options,
`arguments` parses and checks what was typed, `lookup` finds the runs, adapters, bases and data that it names, `help`
prints help, `console` prints everything else, `reporter` shows progress, and `table` fits tables to the terminal.
"""
