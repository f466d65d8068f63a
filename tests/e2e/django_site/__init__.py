"""A small Django site for `test_django`: Django's own apps and nothing else, in a process of its own per node."""
