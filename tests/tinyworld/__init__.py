"""How the built-in base model `tiny` and its sample tasks are made, from code alone.

`grammar` writes the pretraining text, `pretrain` learns the tokenizer and the model from it, and
`tasks` writes the sample data sets, which the pretraining text never contains.
"""
