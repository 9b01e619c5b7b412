"""How often to save: formulae, without states, files or clocks."""
