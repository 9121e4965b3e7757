"""`octavo bench`: seeded measurements of one engine or one server, on fixed workloads."""
