"""A run on the Hub: the facts of it, the model card that says them, and the repository that holds both."""
