"""Configuration: frozen dataclasses, the rules between their fields, YAML with dotted overrides."""
