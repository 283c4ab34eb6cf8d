"""The model's own pretraining objective at test time: not a method but an alias, so this file holds no class.

In params.yaml ``method: ssl`` means ``simclr`` for a model pretrained by SimCLR and ``mae`` for one pretrained by MAE, so that
one run compares both.
"""
