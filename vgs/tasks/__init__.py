"""Built-in tasks: data, small models and a scorer that need no download."""
