"""The value type, the table of operations, and the one walk over nests."""
