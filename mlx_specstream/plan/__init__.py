"""The planner: what a step costs here, what it will yield, and which tree pays best."""
