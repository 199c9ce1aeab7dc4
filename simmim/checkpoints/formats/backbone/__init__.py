"""Networks of other libraries in the formats of these libraries, read by them."""
