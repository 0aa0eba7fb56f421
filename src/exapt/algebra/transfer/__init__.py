"""Transfer of parameter shifts between bases: by permutations of hidden units, along trajectories, through synthesised data; compatibility of updates."""
