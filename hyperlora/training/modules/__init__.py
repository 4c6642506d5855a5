"""One LightningModule per file, named after the network that it trains."""
