"""`jaxserve plan`: what a model takes and gives on devices that need not be there, from its config.json alone."""
