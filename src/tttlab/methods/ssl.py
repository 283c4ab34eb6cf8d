"""The model's own objective at test time: not a method but an alias, so this file holds no class.

In params.yaml ``method: ssl`` means, for every model, the method named by its ``objective.name``:
``simclr``, ``mae``, ``rotation``, and so on. One run compares them.
"""
