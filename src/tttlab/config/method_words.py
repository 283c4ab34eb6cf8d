"""Words that methods are declared and refused with; nothing else is imported here."""

NO_LOSS = (
    "has no loss to train with; write loss(self, net, views, statistics, state), "
    "or trains = False for a method that only predicts"
)
HOOKS = (
    "check",
    "source_statistics",
    "views",
    "init_state",
    "loss",
    "after_step",
    "predict",
    "predict_batch",
    "averaged_views",
)
