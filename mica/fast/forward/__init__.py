"""The forwards of adapted layers: decided first, then computed."""
