"""`phantom vote` and `phantom score votes`: blind pairwise comparisons by people, and the scores of their votes."""
