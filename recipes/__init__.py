"""LightningModule, data modules, command line and report."""
