"""The composition root: a `TrainConfig` becomes objects. The only reader of the tree."""
