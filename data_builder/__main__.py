"""``python -m data_builder``: the same as ``data-builder``."""

from data_builder.cli import app

if __name__ == "__main__":
    app()
