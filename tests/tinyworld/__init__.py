"""The embedded base model `tiny` and its sample tasks: how they are made, from nothing but code.

`grammar` writes the pretraining text, `pretrain` learns the tokenizer and the model from it, and
`tasks` writes the sample data sets, which the pretraining text never contains.
"""
