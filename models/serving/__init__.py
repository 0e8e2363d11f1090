"""The model server; see ``python -m models.serving --help``."""
