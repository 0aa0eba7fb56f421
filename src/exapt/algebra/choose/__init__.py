"""Weights of a merge chosen by validation rows, with or without labels, and how sure the choice is; coefficients learned by descent."""
