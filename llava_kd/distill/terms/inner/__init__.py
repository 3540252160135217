"""Terms that read inner layers by taps: hints, mutual information of states, early exits."""
