"""Tiers, the transfer engine between them, and the stores of weights and KV cache on them."""
