"""Loss formulas: `reference` is the oracle, the other modules are the fast forms tested against it."""
