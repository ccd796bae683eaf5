"""The tables and figures of the RV-VAE paper, measured again with the systems in `examples/`: one command per claim."""
