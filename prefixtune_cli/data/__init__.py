"""Data: files in, checked rows, tokens with a mask, statistics out.

`load` reads and checks, `format` knows the column layouts, `tokenize` masks, `inspect` describes.
Nothing here knows a model or a trainer.
"""
