"""Circuit breakers for Infinity-style autoregressive image models."""
