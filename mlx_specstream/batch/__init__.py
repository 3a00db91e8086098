"""Several requests in one pass: chains with an accept length per sequence [SS App. F]."""
