"""Start a run from a recipe: settings, preparation of model and data, then the train command."""
