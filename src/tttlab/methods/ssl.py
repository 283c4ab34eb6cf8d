"""The model's own objective at test time: not a method but an alias, so this file holds no class.

In params.yaml ``method: ssl`` means, for every model, the method that is named as its ``objective.name``: ``simclr``, ``mae``,
``rotation``, and so on; one run compares them.
"""
