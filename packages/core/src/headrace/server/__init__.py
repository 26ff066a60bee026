"""The parameter server role: it coordinates updates and owns the holders."""
