"""``Options``: keyword arguments of a network, as a configuration file states them."""

from typing import Any

Options = dict[str, Any]
"""Names and values, passed on as ``**options``; the network checks them."""
