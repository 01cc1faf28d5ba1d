"""Training of the physics branch and the coupling beside the frozen video branch."""
