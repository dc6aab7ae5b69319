"""Circuit breakers: hidden states of harmful prompts turned away, all others held in place."""
