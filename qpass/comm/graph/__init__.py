"""Collectives in graphs: reading them, the rules that compress them, and what runs them."""
