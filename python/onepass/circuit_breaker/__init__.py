"""Circuit breakers: representation rerouting for language models and for Infinity."""
