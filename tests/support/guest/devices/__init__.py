"""Programs that serve devices to test guests, where no example does."""
