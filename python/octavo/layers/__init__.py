"""Building blocks of the models: each owns its weights and says which checkpoint tensors they are
made of.
"""
