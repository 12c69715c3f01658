"""What can be said of a run from its store alone: checks, tables, figures, comparisons. Never sees a model."""
